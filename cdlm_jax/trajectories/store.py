"""The trajectory store: a TFDS dataset (ArrayRecord files) that loses at most the shard in progress when it is killed.

A store is a folder. `store.json` holds its settings; shard i holds records `metadata.records(i)`, a pure function of
these settings, so resuming is writing the shards whose files are missing. Every file is written under a temporary name
and renamed when complete, so a file under its final name is a whole one. `finish` adds the index of TFDS: then
`tfds.builder_from_directory(folder).as_data_source(split="train")` opens the folder too, without TensorFlow.

One record (method.md section 2; L = gen_length, P_max = prompt_length, d = hidden_size):

    prompt         [P_max] int32   right-padded prompt tokens
    prompt_length  []      int32
    tokens         [L]     int32   the teacher's final response
    order          [L]     int32   decoding step that finalized each position
    hidden         [L, d]  bf16    the teacher's normed hidden row that produced each token, when it was finalized
    answer         [L]     int32   ground-truth response, cut or EOS-padded to L
    temperature    []      float32 of the teacher's sampling
    prompt_id      []      int64   index of the prompt in its source
    task           []      int32   index into `metadata.tasks`
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cdlm_jax.config import InputError, LogitAlignment
from cdlm_jax.files import check_tree, read_text

SETTINGS = "store.json"
INDEX = (
    "features.json",
    "dataset_info.json",
)  # of TFDS; the last one is written last and says that the store is finished
PARTIAL = ".cdlm-partial"  # ends the name of every file being written

Record = Mapping[str, np.ndarray | np.generic]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a store holds and which settings made it. Two runs may share a store only if all of this is equal.

    model_fingerprint, tokenizer_fingerprint: hashes of the teacher's weights and of its tokenizer.
    source: where the prompts come from, in words or as a path; with `seed` it determines prompt i.
    num_records: in the whole store; every shard holds `shard_size` of them, the last one the rest.
    """

    model_fingerprint: str
    tokenizer_fingerprint: str
    prompt_length: int
    gen_length: int
    block_size: int
    hidden_size: int
    logit_alignment: LogitAlignment
    mask_token_id: int
    eos_token_id: int
    temperatures: tuple[float, ...]
    tasks: tuple[str, ...]
    source: str
    seed: int
    num_records: int
    shard_size: int

    def __post_init__(self):
        for name in ("prompt_length", "gen_length", "block_size", "hidden_size", "num_records", "shard_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of a trajectory store must be at least 1, got {getattr(self, name)}")

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_records / self.shard_size)

    def records(self, shard: int) -> range:
        """Indices of the records that belong in `shard`."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_records))

    def schema(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of every field of a record."""
        return schema(self.prompt_length, self.gen_length, self.hidden_size)


def schema(prompt_length: int, gen_length: int, hidden_size: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of every field of a record of these sizes."""
    prompt, response = (prompt_length,), (gen_length,)
    return {
        "prompt": (prompt, np.int32),
        "prompt_length": ((), np.int32),
        "tokens": (response, np.int32),
        "order": (response, np.int32),
        "hidden": ((gen_length, hidden_size), ml_dtypes.bfloat16),
        "answer": (response, np.int32),
        "temperature": ((), np.float32),
        "prompt_id": ((), np.int64),
        "task": ((), np.int32),
    }


def load_metadata(folder: str | os.PathLike) -> Metadata:
    """Settings of the store in `folder`. InputError: there is none, or `store.json` is not what this version writes."""
    path = Path(folder) / SETTINGS
    try:
        text = read_text(path)
    except InputError as error:
        raise InputError(f"{folder} is not a trajectory store: {error}") from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: not JSON text ({error})") from error
    names = {field.name for field in dataclasses.fields(Metadata)}
    if not isinstance(values, dict) or set(values) != names:
        got = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise InputError(f"{path} was written by another version: got {got}, expected the fields {sorted(names)}")
    found: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
    return Metadata(**found)


def bytes_per_record(metadata: Metadata) -> int:
    """Upper bound on the disk bytes of one record, before compression (about 2 MiB for a 7-8B teacher at L = 256)."""
    names_and_framing = 512
    payload = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in metadata.schema().values())
    return payload + names_and_framing


def bytes_per_shard(metadata: Metadata, shard: int) -> int:
    """Upper bound on the size of a shard file: ArrayRecord fills up 64 KiB blocks, and its footer has its own."""
    block = 64 * 1024
    return math.ceil(len(metadata.records(shard)) * bytes_per_record(metadata) / block) * block + 2 * block


@dataclasses.dataclass(frozen=True)
class Store:
    """A store being written, made by `create_or_resume`. Several processes may write different shards of one store."""

    folder: Path
    metadata: Metadata

    @classmethod
    def create_or_resume(cls, folder: str | os.PathLike, metadata: Metadata) -> "Store":
        """Opens `folder` for writing: a new store, or an interrupted one with the same metadata, minus its leftovers.

        InputError: the store there was made with other settings (each named), the folder holds something else, or the
        disk has no room for the shards still to be written.
        """
        store = cls(Path(folder), metadata)
        try:
            store.folder.mkdir(parents=True, exist_ok=True)
            check_tree(store.folder)
            _remove_dead_partials(store.folder)
            names = sorted(path.name for path in store.folder.iterdir())
        except OSError as error:
            raise InputError(f"cannot keep a trajectory store in {folder}: {error.strerror}") from error
        if names and SETTINGS not in names:
            raise InputError(f"{folder} holds {names[0]!r} but no trajectory store; give a new or an empty folder")
        if names:
            _refuse_difference(store.folder, load_metadata(store.folder), dataclasses.asdict(metadata))
        store._check_room()
        if not names:
            with _replacing(store.folder / SETTINGS) as path:
                path.write_text(json.dumps(dataclasses.asdict(metadata), indent=2) + "\n")
        return store

    def missing_shards(self) -> list[int]:
        """Shards still to be written, in order."""
        return [i for i in range(self.metadata.num_shards) if not _shard_path(self.folder, self.metadata, i).exists()]

    def write_shard(self, shard: int, records: Iterable[Record]) -> None:
        """Writes one whole shard: all of `metadata.records(shard)`, in that order; a present one is replaced.

        Equal records give equal bytes. ValueError: wrong number of records, or a field of another shape or dtype than
        in the schema. InputError: the file cannot be written (disk full ...); nothing is left of it, finished shards
        are untouched.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        # Everything is serialized before the file is opened: whatever fails below is a failure of writing.
        examples = [_serialize(self.metadata, record) for record in records]
        expected = len(self.metadata.records(shard))
        if len(examples) != expected:
            raise ValueError(
                f"shard {shard} of {self.metadata.num_shards} takes {expected} records, got {len(examples)}"
            )
        with _replacing(_shard_path(self.folder, self.metadata, shard)) as path:
            writer = ArrayRecordWriter(str(path), "group_size:1")  # one record per chunk: cheap random access
            for example in examples:
                writer.write(example)
            writer.close()

    def finish(self) -> None:
        """Writes the TFDS index once all shards are there; then `read` opens the store. Harmless when repeated."""
        if missing := self.missing_shards():
            raise InputError(_unfinished(self.folder, self.metadata, missing))
        info = _dataset_info(self.folder, self.metadata)
        with tempfile.TemporaryDirectory() as written:
            info.write_to_directory(written)
            for name in INDEX:
                with _replacing(self.folder / name) as path:
                    shutil.copyfile(Path(written) / name, path)

    def _check_room(self) -> None:
        need = sum(bytes_per_shard(self.metadata, shard) for shard in self.missing_shards())
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise InputError(
                f"the trajectories still to be written to {self.folder} may need {need / 2**20:,.1f} MiB, "
                f"but the disk has {free / 2**20:,.1f} MiB free"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectories:
    """A finished store as a random-access source of records (dicts of read-only arrays), for `grain.MapDataset`."""

    folder: Path
    metadata: Metadata
    source: Any  # the TFDS data source

    def __len__(self) -> int:
        return self.metadata.num_records

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Record `index`, of the shapes and dtypes of `metadata.schema()`. InputError: its shard is damaged."""
        index = range(len(self))[index]
        try:
            return self.source[index]
        except RuntimeError as error:  # a failed checksum or read of ArrayRecord
            path = _shard_path(self.folder, self.metadata, index // self.metadata.shard_size)
            raise InputError(_damaged(path, str(error))) from error


def read(folder: str | os.PathLike, **expect: Any) -> Trajectories:
    """Opens a finished store for random access.

    expect: fields of Metadata that must have these values, for instance `model_fingerprint=..., block_size=32`;
    `**dataclasses.asdict(metadata)` for all of them.
    InputError: no store, an unfinished one, one with other settings (each field named), or a damaged shard (by name).
    A shard that lost its end is found here, a flipped bit when its record is read.
    """
    import tensorflow_datasets as tfds

    folder = Path(folder)
    metadata = load_metadata(folder)
    _refuse_difference(folder, metadata, expect)
    missing = Store(folder, metadata).missing_shards()
    if missing or not all((folder / name).exists() for name in INDEX):
        raise InputError(_unfinished(folder, metadata, missing))
    check_tree(folder)
    for shard in range(metadata.num_shards):
        _check_whole(_shard_path(folder, metadata, shard), len(metadata.records(shard)))
    try:
        source = tfds.builder_from_directory(folder).as_data_source(split="train")
    except Exception as error:  # TFDS has no error class of its own for an index that it cannot parse
        raise InputError(
            f"damaged index of the trajectory store {folder}: {error}; "
            f"delete its {' and '.join(INDEX)} and run the same `cdlm collect` again"
        ) from error
    return Trajectories(folder, metadata, source)


def _check_whole(path: Path, expected: int) -> None:
    """Refuses a shard file that has no sound end (which holds the number of records), or another number of records."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    found = reader.num_records()  # 0 if the file has no sound end; closing it then raises the reason
    try:
        reader.close()
    except RuntimeError as error:
        raise InputError(_damaged(path, str(error))) from error
    if found != expected:
        raise InputError(_damaged(path, f"got {found} records, expected {expected}"))


def _features(metadata: Metadata):
    """The TFDS features. As raw bytes they keep bfloat16 (which tf.Example lacks), exact dtypes and a fixed size."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding=tfds.features.Encoding.BYTES)
            for name, (shape, dtype) in metadata.schema().items()
        }
    )


def _serialize(metadata: Metadata, record: Record) -> bytes:
    """One record as a tf.Example, deterministic (in `features.serialize_example` the field order varies by process)."""
    import tensorflow_datasets as tfds

    schema = metadata.schema()
    if set(record) != set(schema):
        raise ValueError(f"a record has the fields {sorted(schema)}, got {sorted(record)}")
    arrays = {name: np.asarray(value) for name, value in record.items()}
    for name, (shape, dtype) in schema.items():
        if arrays[name].shape != shape or arrays[name].dtype != dtype:
            raise ValueError(
                f"{name} must be {np.dtype(dtype)}{list(shape)}, got {arrays[name].dtype}{list(arrays[name].shape)}"
            )
    features = _features(metadata)
    serializer = tfds.core.ExampleSerializer(features.get_serialized_info())
    return serializer.get_tf_example(features.encode_example(arrays)).SerializeToString(deterministic=True)


def _dataset_info(folder: Path, metadata: Metadata):
    """The TFDS description of the finished shards."""
    import tensorflow_datasets as tfds

    shards = range(metadata.num_shards)
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[len(metadata.records(shard)) for shard in shards],
        num_bytes=sum(_shard_path(folder, metadata, shard).stat().st_size for shard in shards),
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="trajectories", split="train", filetype_suffix="array_record"
        ),
    )
    identity = tfds.core.DatasetIdentity(
        name="trajectories", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=_features(metadata))
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    info.set_splits(tfds.core.SplitDict([split]))
    return info


def _shard_path(folder: Path, metadata: Metadata, shard: int) -> Path:
    """The name that TFDS gives to this shard."""
    return folder / f"trajectories-train.array_record-{shard:05d}-of-{metadata.num_shards:05d}"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary file, which takes the name `path` if the block ends well and is removed if it does not.

    The lock tells a living writer's file from that of a dead one: the system drops it with the process.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with open(temporary, "xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield temporary
            os.fsync(file.fileno())
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # ArrayRecord reports a failed write as RuntimeError
        raise InputError(
            f"cannot write {path}: {error}; finished shards are kept: solve this, then run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the renames in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_dead_partials(folder: Path) -> None:
    for path in folder.glob("*" + PARTIAL):
        # Locked by a living writer, or removed by it just now: not ours to touch.
        with contextlib.suppress(BlockingIOError, FileNotFoundError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _refuse_difference(folder: Path, metadata: Metadata, expect: Mapping[str, Any]) -> None:
    got = dataclasses.asdict(metadata)
    if unknown := sorted(set(expect) - set(got)):
        raise TypeError(f"unknown trajectory store settings {unknown}; known are {sorted(got)}")
    if different := [
        f"{name}: got {got[name]!r}, expected {expect[name]!r}" for name in expect if got[name] != expect[name]
    ]:
        raise InputError(f"the trajectory store {folder} was made with other settings: {'; '.join(different)}")


def _unfinished(folder: Path, metadata: Metadata, missing: list[int]) -> str:
    what = f"{len(missing)} of {metadata.num_shards} shards are missing" if missing else "its index is missing"
    return f"the trajectory store {folder} is unfinished: {what}; run the same `cdlm collect` again to continue it"


def _damaged(path: Path, reason: str) -> str:
    return (
        f"damaged trajectory shard {path}: {reason}; delete this file and run the same `cdlm collect` again to redo it"
    )
