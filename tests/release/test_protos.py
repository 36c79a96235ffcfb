"""The hand-written .proto files agree with what TorchServe itself was built from, and with the Python beside them."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorSet

from marwright.release.protos import inference_pb2, management_pb2
from tests import torchserve

PROTOS = torchserve.PROJECT / "marwright" / "release" / "protos"


def compiled(folder: Path, name: str) -> FileDescriptorSet:
    out = folder / f"{name}.bin"
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"--descriptor_set_out={out}", name],
        cwd=folder,
        check=True,
        timeout=60,
    )
    return FileDescriptorSet.FromString(out.read_bytes())


def fields(message: DescriptorProto) -> dict[str, tuple[int, int]]:
    return {field.name: (field.number, field.type) for field in message.field}


@pytest.mark.parametrize(("name", "ours"), [("inference", inference_pb2), ("management", management_pb2)])
def test_every_message_field_and_call_is_torchserves(tmp_path: Path, name: str, ours: object) -> None:
    distribution = importlib.metadata.distribution("torchserve")
    with zipfile.ZipFile(str(distribution.locate_file("ts/frontend/model-server.jar"))) as jar:
        text = jar.read(f"proto/{name}.proto").decode()
    # google/rpc is not at hand, and only StreamPredictions2 needs it
    text = re.sub(r".*google[./]rpc.*", "", text)
    (tmp_path / f"{name}.proto").write_text(text)
    (theirs,) = compiled(tmp_path, f"{name}.proto").file
    own = FileDescriptorSet().file.add()
    ours.DESCRIPTOR.CopyToProto(own)  # type: ignore[attr-defined]
    assert own.package == theirs.package
    known = {message.name: fields(message) for message in theirs.message_type}
    for message in own.message_type:
        assert fields(message).items() <= known[message.name].items()
    calls = {call.name: (call.input_type, call.output_type) for call in theirs.service[0].method}
    assert own.service[0].name == theirs.service[0].name
    for call in own.service[0].method:
        assert calls[call.name] == (call.input_type, call.output_type)


@pytest.mark.parametrize(("name", "module"), [("inference", inference_pb2), ("management", management_pb2)])
def test_the_generated_python_is_of_the_proto_beside_it(name: str, module: object, tmp_path: Path) -> None:
    (tmp_path / f"{name}.proto").write_bytes((PROTOS / f"{name}.proto").read_bytes())
    (written,) = compiled(tmp_path, f"{name}.proto").file
    own = FileDescriptorSet().file.add()
    module.DESCRIPTOR.CopyToProto(own)  # type: ignore[attr-defined]
    for each in (own, written):
        each.ClearField("name")
        nested = [inner for message in each.message_type for inner in message.nested_type]
        for message in (*each.message_type, *nested):
            for field in message.field:
                field.ClearField("json_name")
    assert own == written
