"""Where each of our parameters lies in a model's files: under which name, from which row on.

Ours are Llama's names in Hugging Face's files; a post-norm (`post_self_attn_layernorm`, `post_mlp_layernorm`) has
GLM-4's. Some files hold several linears of the same input as one tensor, one below the other: a rank's block is then a
range of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from conf.schema import Architecture
from parallel.model.hf_shapes import parameter_shapes
from parallel.sharding import Index, Spec


@dataclass(frozen=True)
class Place:
    """A parameter's place in the files: rows from `first_row` on of the tensor `name`, of `shape`."""

    name: str
    shape: tuple[int, ...]
    first_row: int = 0

    def index(self, ours: Index) -> Index:
        """The block of the file's tensor that is this block of the parameter."""
        if self.first_row == 0:
            return ours
        rows = ours[0]
        return (slice(rows.start + self.first_row, rows.stop + self.first_row), *ours[1:])

    def spec(self, ours: Spec) -> Spec:
        """The placement of the parameter's block in the file's tensor."""
        owned = None if ours.owned is None else self.index(ours.owned)
        return replace(ours, name=self.name, shape=self.shape, index=self.index(ours.index), owned=owned)


@dataclass(frozen=True)
class Spelling:
    """How the names in a kind of file differ from ours."""

    modules: Mapping[str, str] = field(default_factory=dict)
    """A layer's module of ours -> theirs."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """A layer's module of theirs -> ours whose rows it holds, in their order."""
    others: Mapping[str, str] = field(default_factory=dict)
    """Parameters outside of layers, ours -> theirs."""
    layers: str = "model.layers."

    def places(self, architecture: Architecture) -> dict[str, Place]:
        """The place of each of our parameters, in canonical order."""
        shapes = parameter_shapes(architecture)
        holder = {ours: theirs for theirs, members in self.fused.items() for ours in members}
        places: dict[str, Place] = {}
        for name, shape in shapes.items():
            if not name.startswith(LAYERS):
                places[name] = Place(self.others.get(name, name), shape)
                continue
            layer, _, rest = name.removeprefix(LAYERS).partition(".")
            module, _, leaf = rest.rpartition(".")
            if module not in holder:
                places[name] = Place(f"{self.layers}{layer}.{self.modules.get(module, module)}.{leaf}", shape)
                continue
            members = self.fused[holder[module]]
            rows = {other: shapes[f"{LAYERS}{layer}.{other}.{leaf}"][0] for other in members}
            first = sum(rows[other] for other in members[: members.index(module)])
            name_there = f"{self.layers}{layer}.{holder[module]}.{leaf}"
            places[name] = Place(name_there, (sum(rows.values()), *shape[1:]), first)
        return places


LAYERS = "model.layers."
"""What our names of a layer's parameters begin with."""
