# SPDX-License-Identifier: Apache-2.0
"""What scripts/mutations.py breaks of loads within the step that computes upon them; see mutation_table.py."""

from __future__ import annotations

from mutation_table import Mutation

__all__ = ["WITHIN_STEP"]

_SCHEDULER = "connectors/vllm/scheduler/within_step.py"
_WORKER = "connectors/vllm/worker/by_layer.py"


def _exact(name: str) -> str:
    return f"tests/unit/connector/within_step/test_exact.py::test_{name}"


def _fault(name: str) -> str:
    return f"tests/unit/connector/within_step/test_faults.py::test_{name}"


def _by_layer(name: str) -> str:
    return f"tests/unit/connector/worker/test_by_layer.py::test_{name}"


_OTHERS = _exact("what_a_failed_step_computed_for_others_is_not_kept")
_FOUND = _exact("vllm_finds_what_was_loaded_in_the_next_step_and_not_before")
_SILENT = _exact("a_step_whose_result_does_not_come_has_failed")
WITHIN_STEP = [
    Mutation(
        "what a step loads is in no prefix cache before it is known to be right",
        _SCHEDULER,
        "self.prefix_cache.take_out(state.blocks[0][local:])",
        "pass",
        _FOUND,
    ),
    Mutation(
        "what a step loaded rightly is in vLLM's prefix cache from the next step on",
        _SCHEDULER,
        "self.prefix_cache.put_back_from(state.request.request_id, local)",
        "pass",
        _FOUND,
    ),
    Mutation(
        "a step counts where every worker says that its loads came whole",
        _SCHEDULER,
        "if came[step.number] >= workers:",
        "if came[step.number]:",
        _SILENT,
    ),
    Mutation(
        "what was computed upon a load of which nothing is known enters no prefix cache",
        _SCHEDULER,
        "self.prefix_cache.put_in_no_more(request_id)",
        "pass",
        _SILENT,
    ),
    Mutation(
        "a load within a step leaves the last token to be computed",
        _SCHEDULER,
        "int(state.request.num_tokens) - 1 - first",
        "int(state.request.num_tokens) - first",
        _exact("a_hit_is_loaded_within_the_step_up_to_the_last_block_before_the_last_token"),
    ),
    Mutation(
        "after a load that failed the next ones hold up no step for a while",
        _SCHEDULER,
        "self._not_before = time.monotonic() + self._pauses.next()",
        "pass",
        _fault("after_a_load_that_failed_loads_go_ahead_of_the_step_for_a_while"),
    ),
    Mutation(
        "what a failed step computed of a request that ended in it is not stored",
        "connectors/vllm/scheduler/side.py",
        "self.storing.drop(self._plan, result.spoilt)",
        "pass",
        _OTHERS,
    ),
    Mutation(
        "what a failed step computed of a request that goes on is not stored",
        _SCHEDULER,
        "state.sound_tokens = min(state.sound_tokens, sound * block_tokens)",
        "pass",
        _OTHERS,
    ),
    Mutation(
        "what a failed step computed is not stored by whom vLLM gave it in that step either",
        _SCHEDULER,
        "next((at for at, block in enumerate(table) if block in computed), 0)",
        "start // block_tokens",
        "tests/unit/connector/within_step/test_rules.py",
    ),
    Mutation(
        "a request that is preempted is computed anew, and stored",
        "connectors/vllm/scheduler/requests.py",
        "        self.stored = 0\n        self.sound_tokens = sys.maxsize\n",
        "        self.stored = 0\n",
        _exact("a_preempted_request_is_computed_anew_and_then_stored"),
    ),
    Mutation(
        "the stream that computes waits for a layer's bytes",
        _WORKER,
        "copy.hold(torch.cuda.current_stream().cuda_stream if self._on_gpu else None)",
        "pass",
        _by_layer("no_layer_is_read_before_its_bytes_are_there"),
    ),
    Mutation(
        "a step in which a layer could not wait has failed",
        _WORKER,
        "self._missed.add(load.request_id)",
        "pass",
        _by_layer("a_wait_that_the_device_refuses_fails_the_load"),
    ),
    Mutation(
        "a step in which a layer did not wait has failed",
        _WORKER,
        "over and all_waited and load",
        "over and load",
        _fault("a_layer_that_does_not_wait_fails_the_load"),
    ),
    Mutation(
        "a step waits for a silent daemon for a short time only",
        "connectors/vllm/worker/loader.py",
        "timeout = min(self._timeout, _WITHIN_STEP_S) if layers is not None else self._timeout",
        "timeout = self._timeout",
        _by_layer("a_step_goes_on_without_a_daemon_that_says_nothing_and_its_load_has_failed"),
    ),
    Mutation(
        "a layer is copied for all chunks of a load, once all are there",
        "connectors/vllm/worker/loader.py",
        "if part.arrived and not (part.acquire and job.layers is not None):",
        "if part.arrived:",
        "tests/unit/connector/worker/test_load_parts.py"
        "::test_layers_are_copied_once_all_chunks_are_there_and_all_are_asked_for_at_a_time",
    ),
]
