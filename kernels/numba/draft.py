"""How functions that are only part of others are compiled: typed and lowered, and no further.

Numba optimises each function together with all that it calls, and makes machine code of it, before
it does so again with whatever calls that one. A loop that reaches its innermost one through five
functions would be optimised five times, and four of the results thrown away. A draft leaves that to
the entry, region or loop that it becomes part of.

Small functions that do arithmetic are no drafts: each is compiled once for many loops, and LLVM
makes better loops of formulas that it has seen by themselves before (KL divergence took 1.2 times
as long else).
"""

from __future__ import annotations

from typing import Any

from numba import _dynfunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.typed_passes import NativeLowering

__all__ = ["DraftCompiler"]


class _Draft(JITCodeLibrary):
    """The code of a function, to be linked into that of others and optimised there."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _DraftLowering(NativeLowering):
    """Lowering into a draft, which others find as they find compiled functions."""

    _name = "fastopt_draft_lowering"

    def run_pass(self, state: Any) -> bool:
        name = state.func_id.func_qualname
        state.library = draft = _Draft(state.targetctx.codegen(), name)
        draft.enable_object_caching()
        state.flags.no_compile = True
        super().run_pass(state)
        lowered = state["cr"]
        description = lowered.fndesc
        # By this object numba knows the function; like any without a wrapper it can't be called.
        known = _dynfunc.make_function(
            description.lookup_module(), name, "", 0, lowered.env, (draft,)
        )
        state.targetctx.insert_user_function(known, description, [draft])
        state["cr"] = lowered._replace(cfunc=known)
        return True


class DraftCompiler(CompilerBase):
    """Numba's own passes but for lowering."""

    def define_pipelines(self) -> list[PassManager]:
        passes = PassManager("draft")
        for kind, text in DefaultPassBuilder.define_nopython_pipeline(self.state).passes:
            passes.add_pass(_DraftLowering if kind is NativeLowering else kind, text)
        passes.finalize()
        return [passes]
