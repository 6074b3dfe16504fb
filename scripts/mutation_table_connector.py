# SPDX-License-Identifier: Apache-2.0
"""What scripts/mutations.py breaks in the connector; see mutation_table.py."""

from __future__ import annotations

from mutation_table import Mutation

__all__ = ["CONNECTOR"]


def _scheduler(name: str) -> str:
    return f"tests/unit/connector/scheduler/test_{name}.py"


def _worker(promise: str) -> str:
    file, _, test = promise.partition("::")
    return f"tests/unit/connector/worker/test_{file}.py{test and f'::{test}'}"


_AGAIN, _GROUPS, _READING, _STORING, _WEIGHTS = map(_scheduler, ("again", "groups", "reading", "storing", "weights"))
_LAYOUT = _worker("layout")
CONNECTOR = [
    # -- the scheduler's resets and preemption ----------
    Mutation(
        "preempted without hits = ()",
        "connectors/vllm/scheduler/requests.py",
        "        self.parked_since = None\n        self.hits = ()",
        "        self.parked_since = None",
        _AGAIN,
    ),
    Mutation(
        "a preempted request is told anew which blocks it began upon",
        "connectors/vllm/scheduler/requests.py",
        "        self.first_step = None\n        if self.stage",
        "        if self.stage",
        _scheduler("blocks"),
    ),
    Mutation(
        "a load that is planned outlives a preemption",
        "connectors/vllm/scheduler/requests.py",
        "        if self.stage is Stage.LOADING:\n            return",
        "        if False:\n            return",
        _STORING,
    ),
    Mutation(
        "what failed to be stored is offered again though it was a hit",
        "connectors/vllm/scheduler/requests.py",
        "self.store_after = after\n        self.hits = ()",
        "self.store_after = after",
        _AGAIN,
    ),
    Mutation(
        "vLLM's own prefix is not built upon after a change of weights",
        "connectors/vllm/scheduler/resets.py",
        "return self._reset_at >= self._changed_at",
        "return True",
        _WEIGHTS,
    ),
    Mutation(
        "stores of freed blocks are over before anything is computed",
        "connectors/vllm/scheduler/resets.py",
        "            self.freed.add(request_id)\n",
        "",
        _WEIGHTS,
    ),
    Mutation(
        "beside another connector blocks stay",
        "connectors/vllm/scheduler/resets.py",
        "manager if one is connectors[0] else None",
        "manager",
        _WEIGHTS,
    ),
    Mutation(
        "a reset that failed is none",
        "connectors/vllm/scheduler/resets.py",
        "if after is not None and done:",
        "if after is not None:",
        _WEIGHTS,
    ),
    Mutation(
        "stores planned before a change of weights are dropped",
        "connectors/vllm/scheduler/storing.py",
        "plan.stores = left",
        "pass",
        _WEIGHTS,
    ),
    Mutation(
        "the workers look at their weights after a reset",
        "connectors/vllm/scheduler/side.py",
        "self._weights.prefix_cache_reset(self._step)\n        self.check_weights()",
        "self._weights.prefix_cache_reset(self._step)",
        _WEIGHTS,
    ),
    Mutation(
        "a load promised before a change of weights is void",
        "connectors/vllm/scheduler/side.py",
        "if not (state.cacheable and load.chunks):  # the",
        "if not load.chunks:  # the",
        _WEIGHTS,
    ),
    Mutation(
        "a load under way at a change of weights is void",
        "connectors/vllm/scheduler/side.py",
        "if state.stage in (Stage.LOADING, Stage.LOADED):",
        "if state.stage is Stage.LOADED:",
        _AGAIN,
    ),
    Mutation(
        "blocks stay until their stores are over",
        "connectors/vllm/scheduler/storing.py",
        "if not state.has_stored:  # else",
        "if not state.cacheable:  # else",
        _STORING,
    ),
    Mutation(
        "a request that ends while it loads stores nothing",
        "connectors/vllm/scheduler/side.py",
        "        if state.stage is Stage.LOADING:\n            return False",
        "        if False:\n            return False",
        _STORING,
    ),
    # -- the connector's leases ----------
    Mutation(
        "a lease ends with the load",
        "connectors/vllm/scheduler/side.py",
        "state.stage = Stage.LOADED\n                self._lookups.drop_lease(state)",
        "state.stage = Stage.LOADED",
        _STORING,
    ),
    Mutation(
        "a lease ends with its request",
        "connectors/vllm/scheduler/lookups.py",
        "        self.drop_lease(state)\n        self._link.forget(state.question)\n",
        "        self._link.forget(state.question)\n",
        _READING,
    ),
    Mutation(
        "a miss holds no lease",
        "connectors/vllm/scheduler/side.py",
        "        if tokens <= 0:\n            self._lookups.drop_lease(state)\n",
        "        if tokens <= 0:\n",
        _READING,
    ),
    Mutation(
        "a load whose lease was lost has failed",
        "connectors/vllm/worker/loader.py",
        "if reply.payload[0]:",
        "if True:",
        _worker("transfer::test_a_lease_that_ended_meanwhile_fails_the_whole_load"),
    ),
    Mutation(
        "a store whose copy failed gives its pages back",
        "connectors/vllm/worker/storer.py",
        "connection.abort(lease)\n            raise",
        "raise",
        _worker("transfer::test_a_store_whose_copy_fails_gives_its_memory_back_at_once"),
    ),
    Mutation(
        "blocks of a preempted request are read no more",
        "connectors/vllm/worker/side.py",
        "            for job in jobs:\n                job.gate.shut()",
        "            for job in ():\n                job.gate.shut()",
        _worker("side::test_a_preempted_requests_blocks_are_read_no_more"),
    ),
    # -- checksums, namespaces and adapters ----------
    Mutation(
        "bytes that do not match their checksum reach no block",
        "connectors/vllm/worker/landing.py",
        "right = found == chunk.expected",
        "right = True",
        _worker("transfer::test_bytes_that_do_not_match_are_never_scattered_nor_served_again"),
    ),
    Mutation(
        "a load is reported when nothing writes to its blocks any more",
        "connectors/vllm/worker/loader.py",
        "        if not part.flights:\n            job.parts.remove(part)",
        "        if True:\n            job.parts.remove(part)",
        _worker("load_parts::test_a_load_that_ends_early_is_reported_after_what_it_submitted"),
    ),
    Mutation(
        "memory of a failed store is given back when nothing writes to it any more",
        "connectors/vllm/worker/storer.py",
        "for copy, _ in flying:",
        "for copy, _ in ():",
        _worker("flights::test_a_store_whose_copy_fails_gives_its_lease_up_after_the_other_copies"),
    ),
    Mutation(
        "an adapter that changed during a load fails it",
        "connectors/vllm/worker/loader.py",
        "job.cause if self._may_load(job.load) else Cause.ADAPTER_CHANGED",
        "job.cause",
        _worker("transfer::test_an_adapter_that_changes_during_a_load_fails_it"),
    ),
    Mutation(
        "KV of changed weights is nobody else's",
        "connectors/vllm/scheduler/namespace.py",
        "model=identity + self._epoch",
        "model=identity",
        f"{_READING} {_WEIGHTS}",
    ),
    Mutation(
        "tenants do not meet",
        "connectors/vllm/scheduler/namespace.py",
        "salt=salt_digest(request.cache_salt)",
        'salt=""',
        _READING,
    ),
    Mutation(
        "an adapter's content is in the keys",
        "connectors/vllm/scheduler/namespace.py",
        "            adapter=digest,",
        '            adapter="",',
        _STORING,
    ),
    Mutation(
        "engines of another layout do not meet",
        "connectors/vllm/scheduler/namespace.py",
        "            layout=self.layout,",
        '            layout="",',
        _READING,
    ),
    Mutation(
        "an adapter whose weights were replaced has other blocks",
        "connectors/vllm/scheduler/blocks.py",
        "adapter.lora_int_id and number <= 1:",
        "adapter.lora_int_id:",
        _scheduler("blocks"),
    ),
    Mutation(
        "nothing is stored for an adapter that the worker does not serve",
        "connectors/vllm/scheduler/adapters.py",
        "return self._digests.used(adapter) == digest",
        "return True",
        _STORING,
    ),
    Mutation(
        "a hit is as slow as its slowest shard",
        "connectors/vllm/scheduler/chunks.py",
        "return max(tiers, key",
        "return min(tiers, key",
        _READING,
    ),
    Mutation(
        "blocks that drafts still write to are not stored",
        "connectors/vllm/scheduler/chunks.py",
        "            confirmed -= self.block_tokens",
        "            confirmed -= 0",
        _STORING,
    ),
    # -- models whose layers differ ----------
    Mutation(
        "the last token of a prompt is computed where states cannot be rewound",
        "connectors/vllm/scheduler/chunks.py",
        "(int(state.request.num_tokens) - 1) // self.tokens)",
        "int(state.request.num_tokens) // self.tokens)",
        _GROUPS,
    ),
    Mutation(
        "what the engine has of a window is not written over",
        "connectors/vllm/scheduler/chunks.py",
        "block.is_null or block.block_hash is not None",
        "block.is_null",
        _GROUPS,
    ),
    Mutation(
        "a state is stored where a step ends behind its chunk alone",
        "connectors/vllm/scheduler/kept_blocks.py",
        "    if part.group.need is Need.STATE and stop != end:\n        return []",
        "    if False:\n        return []",
        _GROUPS,
    ),
    Mutation(
        "blocks are kept until all workers have stored them",
        "connectors/vllm/scheduler/kept_blocks.py",
        "if left > workers:",
        "if False:",
        _GROUPS,
    ),
    Mutation(
        "a hit needs all of a window",
        "loracache/groups.py",
        "return max(0, end - self.tokens) // chunk_tokens",
        "return -(-max(0, end - self.tokens) // chunk_tokens)",
        "tests/unit/test_groups.py",
    ),
    # -- layout ----------
    Mutation(
        "the physical order of a block is in its layout",
        "connectors/vllm/worker/layout.py",
        "key=lambda dim: -tensor.stride(dim)",
        "key=lambda dim: dim",
        _LAYOUT,
    ),
    Mutation(
        "a block that lies in pieces is refused",
        "connectors/vllm/worker/layout.py",
        "        if stride != dense:",
        "        if False:",
        _LAYOUT,
    ),
    Mutation(
        "kernel blocks that do not lie together make no block",
        "connectors/vllm/worker/layout.py",
        "if per_block > 1 and tensor.stride(0) != dense:",
        "if False:",
        _LAYOUT,
    ),
    Mutation(
        "numbers of another kind are another layout",
        "connectors/vllm/worker/layout.py",
        "f\"{order}:{str(tensor.dtype).removeprefix('torch.')}\"",
        "order",
        _LAYOUT,
    ),
    Mutation(
        "which layer is of which kind is in the layout",
        "connectors/vllm/worker/layout.py",
        "' '.join(orders)",
        "' '.join(kinds)",
        _LAYOUT,
    ),
    # -- load or compute ----------
    Mutation(
        "loads under way share the link",
        "connectors/vllm/scheduler/load_or_compute.py",
        "self.times.seconds(nbytes + min(self.nbytes, self.loads * nbytes))",
        "self.times.seconds(nbytes)",
        _scheduler("load_or_compute"),
    ),
    Mutation(
        "a tier that is passed over is tried again",
        "connectors/vllm/scheduler/load_or_compute.py",
        "return best + self._tried(tiers, best, chunk_bytes, everything / self._factor)",
        "return best",
        _scheduler("load_or_compute"),
    ),
    Mutation(
        "what is passed over is not held",
        "connectors/vllm/scheduler/lookups.py",
        'if chunks.beside or "cpu" in found[len(state.hits) :]:',
        "if chunks.beside:",
        _scheduler("passing_over"),
    ),
    Mutation(
        "what is passed over is counted",
        "connectors/vllm/scheduler/side.py",
        "            if state.passed_over:",
        "            if False:",
        _scheduler("passing_over"),
    ),
    Mutation(
        "a load that failed tells nothing",
        "connectors/vllm/worker/side.py",
        "if causes.keys() <= {Cause.DEADLINE}:",
        "if True:",
        "tests/unit/connector/test_far_tier.py::test_loads_that_failed_tell_nothing_but_for_those_that_took_too_long",
    ),
]
