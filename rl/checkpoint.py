"""What a run can go on from: its whole state on disk, complete or not there at all, and nothing in it is ever executed.

    checkpoints/step_000000012345/tensors.safetensors   every tensor and array, one behind the other, under readable names
                                  manifest.json         the rest: step, score, meta, the tree of the state, checksums of both files

A state is a tree of dicts (keys: str or int), lists, tuples, None, bool, int, float, str, torch tensors and NumPy arrays or scalars.
In the manifest's JSON a dict is an object and a list an array; what JSON lacks is an object with one key that begins with "$":

    {"$tensor": NAME}  {"$array": NAME}  {"$scalar": NAME}   in the tensor file; each of its tensors is named exactly once
    {"$tuple": [...]}  {"$dict": [[key, value], ...]}        dicts with int keys, or with keys that begin with "$"
    {"$float": "nan" | "inf" | "-inf"}

Loaded tensors are on the CPU, contiguous, and share no memory, whatever they did before.

Killed at any moment, `save` leaves the old sets or the new one, because only renames make a set visible or invisible: a new set is
written and fsynced under `.tmp-*`; a set that is replaced waits as `.old-step_N` and counts as step N while there is no other;
a set that goes is first renamed to `.tmp-*`. The next `save` cleans up. One process at a time may save into a folder.

The best set is the one whose manifest holds the highest score. There is no pointer to it that could be lost or fall behind.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from rl.errors import RunError

__all__ = ["CheckpointError", "Info", "describe", "drop_after", "find", "list_checkpoints", "load", "load_latest_good", "save"]

FORMAT, VERSION = "rl-suite checkpoint", 1
MANIFEST, TENSORS = "manifest.json", "tensors.safetensors"
MAX_DEPTH = 64  # of the tree
MAX_MANIFEST = 16 * 2**20  # bytes; as Python objects JSON takes some twenty times its length
MAX_DIMS = 32  # what every supported NumPy takes
MAX_INT_BITS = 8192  # Python refuses to read decimal numbers of more than 4,300 digits

_SET = re.compile(r"(?:\.old-)?step_(?P<step>[0-9]{12,18})")
_SEALED = re.compile(rb'\{"sha256": "(?P<seal>[0-9a-f]{64})",\n')
_KEYS = ("format", "version", "step", "score", "meta", "file", "tensors", "tree")


class CheckpointError(RunError, ValueError):
    """A checkpoint that cannot be written, or cannot be trusted; the message names the file and the reason."""


class _Kind(NamedTuple):
    """One type of number: in the safetensors header, in torch and in NumPy."""

    code: str | None  # None: safetensors has no such type, its bytes are stored as U8 [..., size]
    size: int  # bytes
    torch: torch.dtype | None
    numpy: np.dtype | None


def _kinds() -> dict[str, _Kind]:
    names = {f"float{8 * n}": (f"F{8 * n}", n) for n in (2, 4, 8)} | {"bfloat16": ("BF16", 2), "bool": ("BOOL", 1)}
    names |= {f"{word}{8 * n}": (f"{letter}{8 * n}", n) for word, letter in (("int", "I"), ("uint", "U")) for n in (1, 2, 4, 8)}
    names |= {"float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1), "complex64": (None, 8), "complex128": (None, 16)}
    in_numpy = {name: np.dtype(name) for name in names if name != "bfloat16" and "_" not in name}
    return {name: _Kind(code, size, getattr(torch, name, None), in_numpy.get(name)) for name, (code, size) in names.items()}


_KINDS = _kinds()
_TORCH_NAMES = {kind.torch: name for name, kind in _KINDS.items() if kind.torch is not None}
_NUMPY_NAMES = {kind.numpy: name for name, kind in _KINDS.items() if kind.numpy is not None}


class Info(NamedTuple):
    """What a manifest says of its set."""

    path: Path
    step: int
    score: float | None
    meta: dict[str, Any]
    size: int  # bytes of the tensor file


# --- writing ----------------------------------------------------------------------------------------------------------------


def save(folder: str | Path, step: int, state: Any, *, meta: dict[str, Any], keep: int, best_score: float | None = None) -> Path:
    """Write `state` as the set of `step` and return its path; then keep the last `keep` sets up to `step`, and the best one.

    Args:
        folder: the folder of all sets; made where it is missing.
        step: env steps; a set of the same step is replaced. Sets of later steps are left alone (see `drop_after`).
        meta: a tree without tensors, which `describe` reads without touching the tensors.
        best_score: the score of this very state, where it was evaluated; of equal ones the later is the best.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission); all earlier sets are as they were.
        TypeError: something in `state` or `meta` is of another type; the message says where.
        ValueError: `step`, `keep` or `best_score` makes no sense, or the tree is too deep, too large or cyclic.
    """
    if type(step) is not int or not 0 <= step < 10**18:
        raise ValueError(f"step must be a whole number from 0, not {step!r}")
    if type(keep) is not int or keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep!r}")
    score = None if best_score is None else float(best_score)
    if score is not None and math.isnan(score):
        raise ValueError("best_score must be a number, not nan")
    if not isinstance(meta, dict):
        raise TypeError(f"meta must be a dict, not {type(meta).__name__}")
    leaves = _Leaves()
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "score": _encode(score, "score", None),
        "meta": _encode(meta, "meta", None),
        "tree": _encode(state, "state", leaves),
    }
    folder = Path(folder)
    target = folder / f"step_{step:012d}"
    try:
        _make_folder(folder)
        _tidy(folder)
        scratch = _hidden(folder)
        try:
            os.mkdir(scratch)
            body["file"], body["tensors"] = _write_tensors(scratch / TENSORS, leaves)
            _write_manifest(scratch / MANIFEST, body)
            _sync_folder(scratch)
            _put(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {target}: {error.strerror or error}; earlier ones are untouched") from error
    try:
        _rotate(folder, step, keep)
    except OSError as error:
        raise CheckpointError(f"{target} is written, but an old checkpoint cannot be removed: {error}") from error
    return target


def drop_after(folder: str | Path, step: int) -> None:
    """Remove the sets of steps later than `step`, for a run that goes back: else "last" would mean them.

    Raises CheckpointError where one cannot be removed.
    """
    try:
        _tidy(Path(folder))
        for later, path in _sets(Path(folder)).items():
            if later > step:
                _discard(path)
    except OSError as error:
        raise CheckpointError(f"cannot remove a checkpoint: {error}") from error


class _Leaves:
    """The tensors met while encoding, each under its own name."""

    def __init__(self) -> None:
        self.by_name: dict[str, tuple[str, list[int], Any]] = {}  # kind, shape, tensor or array

    def add(self, path: str, kind: str, shape: Any, leaf: Any) -> str:
        path = path.partition("/")[2] or path
        name = path
        for k in itertools.count(2):  # {"a/b": x, "a": {"b": y}} lead to one path; "__metadata__" belongs to safetensors
            if name not in self.by_name and name != "__metadata__":
                break
            name = f"{path}~{k}"
        self.by_name[name] = (kind, [int(n) for n in shape], leaf)
        return name


def _encode(node: Any, path: str, leaves: _Leaves | None, depth: int = 0) -> Any:
    """The tree as JSON has it; tensors go to `leaves`. Subclasses are refused where their type would be lost in silence."""
    kind = type(node)
    if node is None or kind is bool:
        return node
    if kind is int:
        if node.bit_length() > MAX_INT_BITS:
            raise ValueError(f"{path}: an int of {node.bit_length()} bits is too large for a checkpoint")
        return node
    if kind is float:
        return node if math.isfinite(node) else {"$float": str(node)}
    if kind is str:
        return _text(node, path)
    if depth >= MAX_DEPTH:
        raise ValueError(f"{path[:200]}...: deeper than {MAX_DEPTH} levels, or it contains itself")
    if isinstance(node, dict):
        return _encode_dict(node, path, leaves, depth)
    if kind in (list, tuple):
        parts = [_encode(part, f"{path}/{i}", leaves, depth + 1) for i, part in enumerate(node)]
        return parts if kind is list else {"$tuple": parts}
    if leaves is not None:
        if isinstance(node, torch.Tensor):
            name = _TORCH_NAMES.get(node.dtype)
            if name is None or node.layout is not torch.strided or node.device.type == "meta":
                raise TypeError(f"{path}: a checkpoint cannot hold a tensor of {node.dtype}, {node.layout}, on {node.device}")
            return {"$tensor": leaves.add(_text(path, path), name, node.shape, node)}
        if kind is np.ndarray or isinstance(node, np.generic):
            name = _NUMPY_NAMES.get(node.dtype.newbyteorder("="))
            if name is None:
                raise TypeError(f"{path}: a checkpoint cannot hold a NumPy {kind.__name__} of {node.dtype}")
            array = np.asarray(node, node.dtype.newbyteorder("="))
            return {"$array" if kind is np.ndarray else "$scalar": leaves.add(_text(path, path), name, array.shape, array)}
    raise TypeError(f"{path}: a checkpoint cannot hold a {kind.__module__}.{kind.__qualname__}" + (" here" if leaves is None else ""))


def _encode_dict(node: dict[Any, Any], path: str, leaves: _Leaves | None, depth: int) -> Any:
    plain = True
    for key in node:
        if type(key) is str:
            _text(key, path)
            plain = plain and not key.startswith("$")
        elif type(key) is int and key.bit_length() <= MAX_INT_BITS:
            plain = False
        else:
            raise TypeError(f"{path}: keys must be str or int, not {key!r}")
    if plain:
        return {key: _encode(value, f"{path}/{key}", leaves, depth + 1) for key, value in node.items()}
    return {"$dict": [[key, _encode(value, f"{path}/{key}", leaves, depth + 1)] for key, value in node.items()]}


def _text(text: str, path: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # two lone halves of a pair would come back as one character
        raise ValueError(f"{path!a}: a text that is not valid Unicode") from None
    return text


def _header(tensors: dict[str, tuple[str, list[int]]]) -> tuple[bytes, int]:
    """What a safetensors file of these tensors, in this order, begins with, and how many bytes of data follow."""
    entries, start = {}, 0
    for name, (kind, shape) in tensors.items():
        code, size = _KINDS[kind].code, _KINDS[kind].size
        end = start + size * math.prod(shape)
        entries[name] = {"dtype": code or "U8", "shape": shape if code else [*shape, size], "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, start


def _raw(leaf: Any) -> np.ndarray:
    """The bytes of a tensor or array in C order, uint8 [n]; a view where possible."""
    if isinstance(leaf, torch.Tensor):
        flat = leaf.detach().resolve_conj().resolve_neg().cpu().reshape(-1).contiguous()
        # With up to one element any stride counts as contiguous, but `view` wants 1.
        return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()
    return np.ascontiguousarray(leaf.reshape(-1)).view(np.uint8)


def _write_tensors(path: Path, leaves: _Leaves) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the tensor file, one tensor at a time in memory; its size and checksum, and the table of tensors."""
    # Large types first, as safetensors' own writer has it: so everything is aligned.
    order = sorted(leaves.by_name, key=lambda name: -_KINDS[leaves.by_name[name][0]].size)
    table = {name: leaves.by_name[name][:2] for name in order}
    head, data_size = _header(table)
    digest = hashlib.sha256(head)
    with open(path, "xb") as file:
        file.write(head)
        for name in order:
            raw = _raw(leaves.by_name[name][2]).data
            digest.update(raw)
            file.write(raw)
        _sync(file)
    return {"size": len(head) + data_size, "sha256": digest.hexdigest()}, {name: list(entry) for name, entry in table.items()}


def _write_manifest(path: Path, body: dict[str, Any]) -> None:
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(body[key], allow_nan=False)}" for key in _KEYS)
    rest = f"{lines}}}\n".encode()
    if len(rest) > MAX_MANIFEST - 100:
        raise ValueError(f"the state without its tensors takes {len(rest)} bytes of JSON: large data belongs into tensors")
    with open(path, "xb") as file:
        file.write(b'{"sha256": "%b",\n%b' % (hashlib.sha256(rest).hexdigest().encode(), rest))
        _sync(file)


def _put(scratch: Path, target: Path) -> None:
    """Make the finished set visible under its name."""
    if os.path.lexists(target):
        aside = target.with_name(f".old-{target.name}")
        os.rename(target, aside)
        try:
            os.rename(scratch, target)
        except BaseException:
            os.rename(aside, target)
            raise
        _sync_folder(target.parent)
        _discard(aside)
    else:
        os.rename(scratch, target)
        _sync_folder(target.parent)


def _rotate(folder: Path, step: int, keep: int) -> None:
    sets = _sets(folder)
    doomed = sorted(number for number in sets if number <= step)[:-keep]
    if not doomed:
        return
    scores: dict[int, float] = {}
    for number, path in sets.items():
        try:
            score = describe(path).score
        except CheckpointError:  # it may have been the best: a person shall decide
            doomed = [other for other in doomed if other != number]
            continue
        if score is not None:
            scores[number] = score
    best = _best(scores)
    for number in doomed:
        if number != best:
            _discard(sets[number])


def _best(scores: dict[int, float]) -> int | None:
    return max(scores, key=lambda number: (scores[number], number), default=None)


def _tidy(folder: Path) -> None:
    """Remove what an earlier process left unfinished."""
    for name in os.listdir(folder):
        path = folder / name
        if name.startswith(".tmp-"):
            _remove(path)
        elif name.startswith(".old-") and _SET.fullmatch(name):
            visible = folder / name.removeprefix(".old-")
            if os.path.lexists(visible):
                _discard(path)
            else:
                os.rename(path, visible)


def _discard(path: Path) -> None:
    """Remove a set; a half removed one is never seen."""
    hidden = _hidden(path.parent)
    os.rename(path, hidden)
    _remove(hidden)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _hidden(folder: Path) -> Path:
    return folder / f".tmp-{os.getpid()}-{time.monotonic_ns()}"


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_folder(path.parent)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk too."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


# --- reading ----------------------------------------------------------------------------------------------------------------


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The sets in a folder from the oldest step to the newest, by their names alone; none where there is no folder."""
    return [path for _, path in sorted(_sets(Path(folder)).items())]


def find(folder: str | Path, which: str | int = "last") -> Path:
    """The path of the "last" set, the "best" one, or that of a step (as a number, or in digits).

    Where no set has a score, "best" is the last one. Raises CheckpointError where there is none such, or where a damaged set makes it
    impossible to tell which is the best.
    """
    folder = Path(folder)
    sets = _sets(folder)
    if not sets:
        raise CheckpointError(f"no checkpoint in {folder}" + ("" if folder.is_dir() else ": there is no such folder"))
    if which == "last":
        return sets[max(sets)]
    if which == "best":
        scores: dict[int, float] = {}
        for number, path in sets.items():
            try:
                score = describe(path).score
            except CheckpointError as error:
                raise CheckpointError(f"cannot tell which checkpoint is the best, as one is damaged (remove it?): {error}") from None
            if score is not None:
                scores[number] = score
        best = _best(scores)
        return sets[max(sets) if best is None else best]
    if isinstance(which, str) and re.fullmatch(r"[0-9]{1,18}", which):
        which = int(which)
    if which not in sets:
        raise CheckpointError(f"no checkpoint {which!r} in {folder}: there are last, best, {', '.join(map(str, sorted(sets)))}")
    return sets[which]  # type: ignore[index]


def describe(path: str | Path) -> Info:
    """What the manifest of one set says. The tensors are not looked at. Raises CheckpointError."""
    path = Path(path)
    manifest = _read_manifest(path)
    return Info(path, manifest["step"], manifest["score"], manifest["meta"], manifest["file"]["size"])


def load(path: str | Path, which: str | int = "last") -> tuple[Any, dict[str, Any]]:
    """The state and meta of one set: `path` is a set, or a folder of sets of which `find` takes `which`.

    Raises CheckpointError for whatever is missing, damaged or not ours, naming the file, the reason, and the newest good set.
    """
    path = Path(path)
    if _SET.fullmatch(path.name) or os.path.lexists(path / MANIFEST):
        return _load(path)
    chosen: Path | None = None
    try:
        chosen = find(path, which)
        return _load(chosen)
    except CheckpointError as error:
        others = [other for other in reversed(list_checkpoints(path)) if other != chosen] if chosen or which == "best" else []
        good = next((other.name for other in others if _is_good(other)), None)
        raise CheckpointError(f"{error}; the newest good checkpoint there is {good}" if good else str(error)) from None


def load_latest_good(folder: str | Path) -> tuple[Any, dict[str, Any], list[tuple[Path, str]]]:
    """The state and meta of the newest set that is whole, and what newer ones were skipped, with the reasons.

    Raises CheckpointError where there is none, listing them all.
    """
    skipped: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return *_load(path), skipped
        except CheckpointError as error:
            skipped.append((path, str(error)))
    if not skipped:
        raise CheckpointError(f"no checkpoint in {folder}")
    raise CheckpointError("\n  ".join([f"no good checkpoint in {folder}:", *(reason for _, reason in skipped)]))


def _sets(folder: Path) -> dict[int, Path]:
    """All sets by step. A set that was being replaced when its process died counts where the new one is not there."""
    out: dict[int, Path] = {}
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return out
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from None
    for name in sorted(names):  # ".old-" before "step_", which replaces it
        match = _SET.fullmatch(name)
        if match and name.endswith(f"step_{int(match['step']):012d}"):
            out[int(match["step"])] = folder / name
    return out


def _is_good(path: Path) -> bool:
    try:
        _load(path)
    except CheckpointError:
        return False
    return True


def _load(path: Path) -> tuple[Any, dict[str, Any]]:
    manifest = _read_manifest(path)
    where = path / MANIFEST
    raws = _read_tensors(path / TENSORS, manifest["tensors"], manifest["file"])
    taken: set[str] = set()

    def take(tag: str, name: Any) -> Any:
        if not isinstance(name, str) or name not in raws:
            raise _Bad(f"it refers to a tensor {name!r:.80} that is not there")
        if name in taken:
            raise _Bad(f"it refers to tensor {name!r:.80} twice")
        taken.add(name)
        kind, shape = manifest["tensors"][name]
        raw, dtypes = raws[name], _KINDS[kind]
        if tag == "$tensor":
            if dtypes.torch is None:
                raise _Bad(f"tensor {name!r:.80}: this torch has no {kind}")
            return torch.from_numpy(raw).view(dtypes.torch).reshape(shape) if raw.size else torch.empty(shape, dtype=dtypes.torch)
        if dtypes.numpy is None or (tag == "$scalar" and shape):
            raise _Bad(f"tensor {name!r:.80} cannot be a NumPy {tag[1:]}")
        array = raw.view(dtypes.numpy).reshape(shape)
        return array if tag == "$array" else array[()]

    with _judging(where):
        state = _decode(manifest["tree"], take)
        if len(taken) < len(raws):
            raise _Bad(f"nothing refers to tensor {next(name for name in raws if name not in taken)!r:.80}")
    return state, manifest["meta"]


class _Bad(Exception):
    """Why a manifest is refused."""


@contextlib.contextmanager
def _judging(path: Path) -> Iterator[None]:
    """Turn whatever hostile content can lead to into one error that names the file."""
    try:
        yield
    except RecursionError:
        raise CheckpointError(f"{path}: it is nested too deeply") from None
    except MemoryError:
        raise CheckpointError(f"{path}: there is not enough memory for it") from None
    except (_Bad, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a set, checked in itself; all but the tree, which needs the tensors, is decoded."""
    path = folder / MANIFEST
    with _open(path) as (file, size):
        if size > MAX_MANIFEST:
            raise CheckpointError(f"{path}: {size} bytes are too many (at most {MAX_MANIFEST})")
        data = file.read(MAX_MANIFEST + 1)
    sealed = _SEALED.match(data)
    if not sealed:
        raise CheckpointError(f"{path}: not a checkpoint's manifest, or its beginning is damaged")
    if hashlib.sha256(data[sealed.end() :]).hexdigest().encode() != sealed["seal"]:
        raise CheckpointError(f"{path}: its checksum does not agree: the file is damaged or was cut")
    with _judging(path):
        manifest = _parse(data)
        if manifest.get("format") != FORMAT:
            raise _Bad("not a checkpoint's manifest")
        if manifest.get("version") != VERSION or type(manifest["version"]) is not int:
            raise _Bad(f"written in version {manifest.get('version')!r:.40} of the format; this rl-suite reads version {VERSION}")
        if set(manifest) != {"sha256", *_KEYS}:
            raise _Bad(f"its keys are {sorted(manifest)!r:.200}")
        step, name = manifest["step"], _SET.fullmatch(folder.name)
        if not _is_count(step):
            raise _Bad(f"step {step!r:.40} is not a count")
        if name and int(name["step"]) != step:
            raise _Bad(f"it is of step {step}, the folder's name is not")
        manifest["score"], manifest["meta"] = _decode(manifest["score"]), _decode(manifest["meta"])
        if manifest["score"] is not None and (type(manifest["score"]) is not float or math.isnan(manifest["score"])):
            raise _Bad("its score is not a number")
        if not isinstance(manifest["meta"], dict):
            raise _Bad("its meta is not a dict")
        file = manifest["file"]
        if not isinstance(file, dict) or set(file) != {"size", "sha256"} or not _is_count(file["size"]):
            raise _Bad("it does not say what the tensor file is")
        _check_table(manifest["tensors"])
    return manifest


def _parse(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            raise _Bad("it has a key twice")
        return out

    def refuse(word: str) -> None:
        raise _Bad(f"it contains {word}")

    manifest = json.loads(data.decode("ascii"), object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(manifest, dict):
        raise _Bad("it is not an object")
    return manifest


def _check_table(tensors: Any) -> None:
    if not isinstance(tensors, dict):
        raise _Bad("its table of tensors is not an object")
    for name, entry in tensors.items():
        if not isinstance(entry, list) or len(entry) != 2 or name == "__metadata__":
            raise _Bad(f"its entry of tensor {name!r:.80} makes no sense")
        kind, shape = entry
        if not isinstance(kind, str) or kind not in _KINDS:
            raise _Bad(f"tensor {name!r:.80} is of an unknown type {kind!r:.40}")
        if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
            raise _Bad(f"tensor {name!r:.80} has an impossible shape {shape!r:.80}")
        if math.prod(max(n, 1) for n in shape) >= 2**58:  # also beside a 0, where no size gives it away
            raise _Bad(f"tensor {name!r:.80} has an impossible shape {shape!r:.80}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _read_tensors(path: Path, table: dict[str, Any], expected: dict[str, Any]) -> dict[str, np.ndarray]:
    """The bytes of every tensor. The header is compared, not parsed: it follows from the manifest to the last byte."""
    head, data_size = _header(table)
    digest, raws = hashlib.sha256(), {}
    with _open(path) as (file, size):
        if size != expected["size"]:
            raise CheckpointError(f"{path}: it has {size} bytes, {expected['size']} were written")
        if size != len(head) + data_size:
            raise CheckpointError(f"{path}: it has {size} bytes, the manifest's tensors take {len(head) + data_size}")
        found = file.read(len(head))
        if found != head:
            foreign = " (a pickle? those are never read)" if found[:1] == b"\x80" or found[:2] == b"PK" else ""
            raise CheckpointError(f"{path}: its header is not that of the manifest's tensors{foreign}")
        digest.update(found)
        with _judging(path):
            for name, (kind, shape) in table.items():
                raw = np.empty(_KINDS[kind].size * math.prod(shape), np.uint8)
                _fill(file, raw.data)
                digest.update(raw.data)
                raws[name] = raw
        if digest.hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{path}: its checksum does not agree: the file is damaged")
    for name, (kind, _) in table.items():
        if kind == "bool" and raws[name].size and raws[name].max() > 1:  # undefined behaviour in compiled code
            raise CheckpointError(f"{path}: tensor {name!r:.80} is of bools, but not all are 0 or 1")
    return raws


def _fill(file: BinaryIO, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise _Bad("it ended too early")
        done += count


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A plain file to read and its size; links, pipes and devices are refused, so that a set cannot point outside itself."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if path.is_symlink() or path.parent.is_symlink():
            raise CheckpointError(f"{path}: a symbolic link stands where a checkpoint should")
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a plain file")
            yield file, status.st_size
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(node: Any, take: Callable[[str, Any], Any] | None = None, depth: int = 0) -> Any:
    """The inverse of `_encode`. `take` hands out tensors; None where there must not be any."""
    if not isinstance(node, dict | list):
        return node
    if depth >= MAX_DEPTH + 1:
        raise _Bad("its tree is too deep")
    if isinstance(node, list):
        return [_decode(part, take, depth + 1) for part in node]
    if not any(key.startswith("$") for key in node):
        return {key: _decode(value, take, depth + 1) for key, value in node.items()}
    tag, value = next(iter(node.items()))
    if len(node) == 1:
        if tag in ("$tensor", "$array", "$scalar") and take is not None:
            return take(tag, value)
        if tag == "$tuple" and isinstance(value, list):
            return tuple(_decode(part, take, depth + 1) for part in value)
        if tag == "$float" and value in ("nan", "inf", "-inf"):
            return float(value)
        if tag == "$dict" and isinstance(value, list):
            return _decode_items(value, take, depth)
    raise _Bad(f"its tree contains {node!r:.80}")


def _decode_items(items: list[Any], take: Callable[[str, Any], Any] | None, depth: int) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for item in items:
        if not isinstance(item, list) or len(item) != 2 or type(item[0]) not in (str, int):
            raise _Bad(f"its tree contains a key {item!r:.80}")
        if item[0] in out:
            raise _Bad("it has a key twice")
        out[item[0]] = _decode(item[1], take, depth + 1)
    return out
