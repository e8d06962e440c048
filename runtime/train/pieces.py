"""Tensors that several ranks save and load, each its own pieces, through torch.distributed.checkpoint.

A file is a safetensors file whose table also says where in the whole tensor each piece begins. So a file can be read
without running anything, and any piece of a tensor can be put together of those that other ranks wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

from ..errors import UserError
from ..huggingface.tensors import read_header
from .laying import Box, Piece

PLACES = "DCP_SHARDING_INFO"
"""Where a file's table says at which offsets its pieces lie, as torch.distributed.checkpoint writes it."""


def save_pieces(folder: Path, pieces: Mapping[str, Piece], group: Any) -> None:
    """Write a folder of which each rank of a process group writes a file. All ranks call it; together they have every
    element once. Raises what torch.distributed.checkpoint raises, on all ranks."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(dict(pieces), storage_writer=writer, planner=_Saving(), process_group=group)


class _Saving(SavePlanner):
    """Pieces are where they say; nobody has one that another rank has."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.pieces: dict[str, Piece] = state_dict

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_item(name, piece) for name, piece in self.pieces.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        about: dict[str, Any] = {}
        for item in (item for plan in all_plans for item in plan.items):
            data = item.tensor_data
            assert data is not None
            known = about.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
            known.chunks.append(data.chunk)
        return all_plans, Metadata(about)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self.pieces[write_item.index.fqn].tensor


def _item(name: str, piece: Piece) -> WriteItem:
    offsets, shape, whole = (torch.Size(x) for x in piece.box)
    data = TensorWriteData(
        ChunkStorageMetadata(offsets, shape), TensorProperties.create_from_tensor(piece.tensor), whole
    )
    return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)


class Saved:
    """The tensors of some files, whole or in pieces, and whoever wrote them. `get` reads one at a time.

    Raises UserError `damaged-weights`, `no-such-file`.
    """

    def __init__(self, files: Iterable[Path]):
        self.files = list(files)
        self._about: dict[str, TensorStorageMetadata] = {}
        self._places: dict[Any, Any] = {}
        for path in self.files:
            self._add(path)
        for name, about in self._about.items():
            have = sum(prod(c.sizes) for c in about.chunks)
            if have != prod(about.size):
                raise UserError("damaged-weights", f"`{name}` is not whole in `{self.files[0].parent}`")
        self._reader = HuggingFaceStorageReader(str(self.files[0].parent))
        self._reader.set_up_storage_reader(Metadata(dict(self._about), storage_data=self._places), is_coordinator=True)

    def _add(self, path: Path) -> None:
        header = read_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                places = json.loads((file.metadata() or {}).get(PLACES, "{}"))
                offsets = {name: tuple(places[name]["saved_offsets"]) for name in header if name in places}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError("damaged-weights", f"`{path}` is no whole safetensors file: {error}") from None
        for name, (dtype, shape) in header.items():
            start = offsets.get(name, (0,) * len(shape))
            ends = [a + n for a, n in zip(start, shape, strict=True)]
            known = self._about.setdefault(name, TensorStorageMetadata(TensorProperties(dtype), torch.Size(ends), []))
            known.size = torch.Size(max(a, b) for a, b in zip(known.size, ends, strict=True))
            known.chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(shape)))
            self._places[MetadataIndex(name, torch.Size(start))] = _File(str(path))

    def __contains__(self, name: str) -> bool:
        return name in self._about

    def names(self) -> list[str]:
        return list(self._about)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._about[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self._about[name].properties.dtype

    def get(self, name: str, index: int | None = None) -> Tensor:
        """A whole tensor, or one index of its first axis."""
        shape = self.shape(name)
        if index is None:
            return self.read({name: Box((0,) * len(shape), shape, shape)})[name]
        begin = (index, *(0,) * (len(shape) - 1))
        return self.read({name: Box(begin, (1, *shape[1:]), shape)})[name][0]

    def read(self, boxes: Mapping[str, Box]) -> dict[str, Tensor]:
        """Pieces of tensors, by name."""
        made = {name: torch.empty(box.shape, dtype=self.dtype(name)) for name, box in boxes.items()}
        items: list[ReadItem] = []
        for name, box in boxes.items():
            chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.shape))
            items += create_read_items_for_chunk_list(name, self._about[name], [chunk])
        try:
            self._reader.read_data(LoadPlan(items), _Loading(made)).wait()
        except (SafetensorError, OSError) as error:
            raise UserError("damaged-weights", f"`{self.files[0].parent}` cannot be read: {error}") from None
        return made


class _File(NamedTuple):
    relative_path: str


class _Loading(LoadPlanner):
    """What is read goes straight where it belongs."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        raise NotImplementedError("a plan is made by whoever reads")

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("a plan is made by whoever reads")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError("there are tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        whole = self.tensors[read_item.dest_index.fqn]
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            whole = whole.narrow(dim, start, size)
        return whole

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is there already."""
