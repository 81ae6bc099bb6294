"""What a choice of forms stores: the bytes of its file, and the bits of its weights, as they are built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from qcompiler.ir.serialize import to_bytes
from qcompiler.quant.plan import Form
from qcompiler.search.attribution import Owners
from qcompiler.search.borders import find_borders, reads, stores
from qcompiler.search.file_sizes import FileSizes, FileSplitter, stored_bits
from qcompiler.search.forms_problem import Allowed, Sizes
from qcompiler.search.measure_costs import alternating
from qcompiler.search.weight_sizes import shared_weights, stored_sizes, weights_of
from qcompiler.workshop import Workshop

Forms = Mapping[str, Form]


@dataclass
class SizeMeter:
    """Build choices of forms and see what they store.

    Attributes:
        workshop: builds.
        engine_forms: rewrites in force for every build.
        metadata: what the file says beside the graph, such as the engine that it is for.
        known: files that were built, by their forms.
    """

    workshop: Workshop
    engine_forms: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)
    known: dict[tuple[tuple[str, str], ...], FileSizes] = field(default_factory=dict)

    @cached_property
    def splitter(self) -> FileSplitter:
        """Return what tells whose bytes a file is made of."""
        model, groups = self.workshop.base.model, self.workshop.groups
        shared = frozenset(shared_weights(groups))
        return FileSplitter(Owners.of(model, groups), find_borders(groups, {}), shared)

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """Return the names of the weights that bits are counted of."""
        return tuple(dict.fromkeys(str(v.name) for g in self.workshop.groups for v in weights_of(g)))

    def stored(self, forms: Forms) -> FileSizes:
        """Return what the file of a choice of forms is made of."""
        key = tuple(sorted((name, form) for name, form in forms.items() if form != "float"))
        if key not in self.known:
            built = self.workshop.build(forms, self.engine_forms)
            self.known[key] = self.splitter.split(self._data(built.model), built.forms, self.bits(built.model))
        return self.known[key]

    def bits(self, model: ir.Model) -> int:
        """Return the bits that the weights of groups take in a build."""
        return stored_bits(model, self.weights)

    def table(self, variants: Mapping[str, Forms], allowed: Allowed) -> Sizes:
        """Return the sizes of all forms in the variants, of conversions between them, and of what no choice changes.

        Args:
            variants: forms by the name of the variant, as they are built.
            allowed: forms besides float by group.
        """
        groups = self.workshop.groups
        sizes = stored_sizes(self.workshop.base.model, groups, self.workshop.base.target, allowed)
        fixed: dict[str, Form] = {
            g.name: max(found, key=stores)
            for g in groups
            if (found := [form for form in allowed.get(g.name, ()) if reads(form) == "quantize"])
        }
        mixed = alternating(groups, self.splitter.borders, fixed)
        # Float last: what no choice changes is told from it.
        for forms in (*mixed.values(), *variants.values(), {}):
            sizes = sizes.corrected(self.stored(forms))
        return sizes

    def _data(self, model: ir.Model) -> bytes:
        before = dict(model.metadata_props)
        model.metadata_props.update(self.metadata)
        try:
            return to_bytes(model, strip=True)
        finally:
            model.metadata_props.clear()
            model.metadata_props.update(before)
