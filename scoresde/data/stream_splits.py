"""Open a stream: its training part, and a held-out part in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scoresde.data.dataset import SPLITS, Dataset
from scoresde.data.hub_stream import open_hub_stream
from scoresde.data.items import MIB
from scoresde.data.lazy import AT_LEAST
from scoresde.data.shards import DamagedError, Shards, open_tars
from scoresde.data.source import DataError, UnreadableError
from scoresde.data.stream_items import SURVEYED, Form, Item, Record, label_of, survey
from scoresde.data.stream_source import StreamSource

HELD = 512  # items at the head of a stream without a test split
HELD_AT_MOST = 2048  # items of a test split


def open_stream(
    source: str,
    *,
    size: int | None = None,
    classes: int | None = None,
    buffer: int = 1024,
    unreadable: int = 10,
    limit: int | None = None,
    memory: int = 512 * MIB,
) -> tuple[StreamSource, Dataset]:
    """The training part of a stream, and its held-out items in memory.

    These are the first of the source's own test or validation split; where it has none, the first
    of its first shard, which are not trained on.

    Args:
        source: "hf:owner/name", a .tar file, a folder of such or a pattern with braces or stars.
        size: pictures are centre-cropped and resized to `size x size`.
        classes: number of classes, where the stream has labels and does not know it.
        buffer: records that each reader holds and permutes at a time.
        unreadable: how many different items may be replaced; 0 for none.
        limit: at most so many items are held out.
        memory: bytes that decoded items may take.

    Raises:
        DataError: no such stream, or data that cannot be read.
    """
    splits, names = _open(source)
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    held_split = next((s for s in SPLITS[1:] if s in splits and splits[s] is not train), None)
    own = held_split is None
    count = min(HELD if own else HELD_AT_MOST, limit or HELD_AT_MOST)
    head, notes = _head(train, 0, max(2 * count, SURVEYED) if own else SURVEYED)
    form = survey(train.name, head[:SURVEYED], size, classes or (len(names) if names else None))
    if names and form.classes != len(names):
        raise DataError(f"{train.name}: has {len(names)} classes, but data.classes is {classes}")
    names = names or (tuple(map(str, range(form.classes))) if form.classes else None)
    if form.classes is None and label_of(head[0]) is not None:
        notes.append(
            f"{train.name}: the labels are not used; to use them, set data.classes to the number "
            "of classes"
        )
    if limit is not None:
        notes.append(f"{train.name}: data.limit is for held-out items; a stream is read whole")
    count = min(count, max(AT_LEAST, memory // form.nbytes))
    skipped = max(1, min(count, len(head) // 2)) if own else 0
    records = head[:skipped]
    if held_split is not None:
        records, damage = _records(splits[held_split], count)
        notes += damage
    held = _in_memory(form, records, names, unreadable)
    said = (*notes, *held.notes)
    return StreamSource(train, form, names, skipped, buffer, unreadable, memory, said), held


def _open(source: str) -> tuple[Mapping[str, Shards], tuple[str, ...] | None]:
    """The splits of a stream, and the names of its classes if it says them."""
    if source.startswith("hf:"):
        hub = open_hub_stream(source[3:])
        return hub, next(iter(hub.values())).class_names
    tars = open_tars(source)
    if tars is None:
        raise DataError(
            f"{source}: only hf:owner/name, .tar files, folders of them and patterns such as "
            "shards/train-{0000..0031}.tar can be streamed"
        )
    return tars, None


def _head(shards: Shards, shard: int, n: int) -> tuple[list[Record], list[str]]:
    """At most `n` records of a shard, and what to say of it."""
    records: list[Record] = []
    cursor = shards.open(shard)
    try:
        while len(records) < n:
            records.append(next(cursor))
    except StopIteration:
        pass
    except DamagedError as error:
        return records, [str(error)]
    finally:
        cursor.close()
    return records, []


def _records(shards: Shards, n: int) -> tuple[list[Record], list[str]]:
    """At most `n` records of a split, shard by shard."""
    records: list[Record] = []
    notes: list[str] = []
    for shard in range(len(shards)):
        if len(records) < n:
            more, damage = _head(shards, shard, n - len(records))
            records += more
            notes += damage
    return records, notes


def _in_memory(
    form: Form, records: Sequence[Record], names: tuple[str, ...] | None, unreadable: int
) -> Dataset:
    items: list[Item] = []
    notes: list[str] = []
    for record in records:
        try:
            items.append(form.item(record))
        except UnreadableError as error:
            notes.append(f"{error}; it is left out")
            if len(notes) > unreadable:
                raise DataError(str(error)) from error
    if not items:
        raise DataError(f"{form.name}: none of the held-out items can be read")
    x, y = form.stack(items)
    return Dataset(x, y, form.levels, form.name, names, tuple(notes))
