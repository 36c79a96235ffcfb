"""The tables of the feedback database, and why each is as it is.

| table      | a row is                                                                                          |
|------------|---------------------------------------------------------------------------------------------------|
| meta       | the number of this schema                                                                         |
| answerers  | a bundle that answered, with its spec                                                             |
| classes    | a class that a bundle knows: a label that is none of them is invalid                              |
| requests   | a captured request, or a labelled picture that was none                                           |
| instances  | one answer; `digest` is the name of its example file                                              |
| labels     | what somebody said, as it was said; rows are only added, and whether one counts is asked each time |
| segments   | a segment of the spool that was taken                                                             |
| tombstones | sha256 of the id of a request that is never to be stored again                                    |
| notes      | what the loop writes down: looks at drift, outcomes of turns                                      |

A label refers to no row: it may come before its request. Texts compare by their code points in either database.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
)

SCHEMA = 1

TEXT = Text().with_variant(Text(collation="C"), "postgresql")
NUMBER = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite numbers rows by itself in columns of its own `integer` alone."""

metadata = MetaData()

meta = Table("meta", metadata, Column("name", TEXT, primary_key=True), Column("value", TEXT, nullable=False))

answerers = Table(
    "answerers",
    metadata,
    Column("id", TEXT, primary_key=True),  # sha256 of what follows
    Column("model", TEXT, nullable=False, index=True),
    Column("version", TEXT, nullable=False),  # "" where nothing answered: labelled pictures
    Column("bundle", TEXT, nullable=False),
    Column("task", TEXT, nullable=False),
    Column("spec", TEXT, nullable=False),
)

classes = Table(
    "classes",
    metadata,
    Column("answerer", TEXT, ForeignKey("answerers.id", ondelete="CASCADE"), nullable=False),
    Column("label", TEXT, nullable=False),
    PrimaryKeyConstraint("answerer", "label"),
)

requests = Table(
    "requests",
    metadata,
    Column("id", TEXT, primary_key=True),
    Column("answerer", TEXT, ForeignKey("answerers.id"), nullable=False),
    Column("time", Double, nullable=False),
    Column("sha256", TEXT, nullable=False),  # of the body as it was received
    Column("type", TEXT, nullable=False),
    Index("requests_answerer_time", "answerer", "time"),
    Index("requests_time", "time"),
)

instances = Table(
    "instances",
    metadata,
    Column("request", TEXT, ForeignKey("requests.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("answer", TEXT, nullable=False),
    Column("value", Double),
    Column("confidence", Double),
    Column("probabilities", LargeBinary),  # float32, little-endian
    Column("embedding", LargeBinary),  # float16, little-endian
    Column("statistics", TEXT, nullable=False),  # JSON
    Column("digest", TEXT, nullable=False),
    Column("suffix", TEXT, nullable=False),
    Column("size", BigInteger, nullable=False),  # bytes of the example file
    PrimaryKeyConstraint("request", "number"),
    Index("instances_digest", "digest"),
)

labels = Table(
    "labels",
    metadata,
    Column("uid", TEXT, primary_key=True),
    Column("request", TEXT, nullable=False),
    Column("instance", Integer, nullable=False),
    Column("label", TEXT, nullable=False),
    Column("number", Double),  # the label, where it is a finite number
    Column("source", TEXT, nullable=False),
    Column("time", Double, nullable=False),  # when it was said, or else received
    Column("received", Double, nullable=False),
    Index("labels_request", "request", "instance"),
)

segments = Table(
    "segments",
    metadata,
    Column("name", TEXT, primary_key=True),
    Column("time", Double, nullable=False),
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("id", TEXT, primary_key=True),
    Column("time", Double, nullable=False),
    Column("known", Integer, nullable=False),  # whether anything was there to be removed
)

notes = Table(
    "notes",
    metadata,
    Column("id", NUMBER, primary_key=True, autoincrement=True),
    Column("kind", TEXT, nullable=False),
    Column("model", TEXT, nullable=False),
    Column("time", Double, nullable=False),
    Column("document", TEXT, nullable=False),
    Index("notes_kind_model", "kind", "model", "id"),
)
