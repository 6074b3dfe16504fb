# SPDX-License-Identifier: Apache-2.0
"""What scripts/mutations.py breaks of moves, tenants, keys, adapters and the architecture; see mutation_table.py."""

from __future__ import annotations

from mutation_table import Mutation

__all__ = ["CONTROL"]

_MOVES = "tests/unit/control/test_moving.py"
_ROLES = "tests/unit/rest/test_roles.py"
_EVERY_ROLE = f"{_ROLES}::test_every_role_gets_what_it_may_and_nothing_else"
_OWN_SALT = f"{_ROLES}::test_a_tenants_token_reaches_what_is_restricted_to_its_salt_and_the_route_knows_whose_it_is"
CONTROL = [
    # -- moves ----------
    Mutation(
        "a move that keeps nothing leaves its source",
        "loracache/control/transfer.py",
        "self._arrived += [node.key for node in arrived]",
        "self._arrived += []",
        _MOVES,
    ),
    Mutation(
        "a move leaves children before their parents",
        "loracache/control/transfer.py",
        "elif not node.children[source]:",
        "elif True:",
        _MOVES,
    ),
    Mutation(
        "two moves never take an object out of both tiers",
        "loracache/control/transfer.py",
        "if key in self._cache.leaving:",
        "if False:",
        "tests/unit/control/test_moving.py::test_what_another_move_is_taking_out_of_a_tier_stays_at_its_source",
    ),
    Mutation(
        "a source is left only as far as the target still has the object",
        "loracache/control/transfer.py",
        "node.held_in(self._target)",
        "True",
        "tests/unit/control/test_moving.py::test_what_the_target_dropped_again_stays_at_its_source",
    ),
    Mutation(
        "a move holds nothing when it has ended",
        "loracache/control/transfer.py",
        "self._cache.index.unhold(node)",
        "pass",
        _MOVES,
    ),
    Mutation(
        "a queued write does not bring back what was moved out of Redis",
        "loracache/control/transfer.py",
        'redis.forget(node, "moved")',
        "pass",
        "tests/unit/control/test_moving.py::test_a_write_that_is_queued_does_not_bring_back_what_was_moved_out_of_redis",
    ),
    # -- tenants ----------
    Mutation(
        "a tenant selects inside of its own salt",
        "loracache/control/selection.py",
        "salt = scope or selector.salt",
        "salt = selector.salt",
        "tests/unit/control/test_selection.py",
    ),
    Mutation(
        "another's salt selects nothing for a tenant",
        "loracache/control/selection.py",
        "if scope and selector.salt not in (None, scope):",
        "if False:",
        "tests/unit/control/test_selection.py",
    ),
    Mutation(
        "another tenant's object is as if it were not there",
        "loracache/control/selection.py",
        "return namespace is not None and namespace.salt == scope",
        "return namespace is not None",
        "tests/unit/control/test_selection.py",
    ),
    Mutation(
        "tokens without a tenant mean those without a salt",
        "loracache/control/selection.py",
        'selector.adapter or "", salt or ""',
        'selector.adapter or "", salt',
        "tests/unit/control/test_selection.py",
    ),
    Mutation(
        "a tenant sees no job of others",
        "loracache/control/jobs.py",
        "(scope and operation.scope != scope)",
        "False",
        "tests/unit/rest/test_tenants.py::test_operations_are_ones_own",
    ),
    Mutation(
        "a tenant's token does not reach what is everybody's",
        "loracache/rest/roles.py",
        "if principal.tenant and not self.tenants:",
        "if False:",
        f"{_EVERY_ROLE} {_OWN_SALT}",
    ),
    Mutation(
        "a token of a lower role is refused",
        "loracache/rest/roles.py",
        "if RANKS[principal.role] < RANKS[self.role]:",
        "if False:",
        _EVERY_ROLE,
    ),
    # -- keys and digests ----------
    Mutation(
        "every salt is another tenant",
        "loracache/keys.py",
        'b"loracache/salt\\0" + salt.encode()',
        'b"loracache/salt\\0"',
        "tests/unit/test_keys.py",
    ),
    Mutation(
        "images behind equal tokens are told apart",
        "loracache/keys.py",
        "        if spans:\n",
        "        if False:\n",
        "tests/unit/test_keys.py",
    ),
    Mutation(
        "the shards of a chunk are objects of their own",
        "loracache/keys.py",
        "hashlib.sha256(chunk_key + shard.encode())",
        "hashlib.sha256(chunk_key)",
        "tests/unit/test_keys.py",
    ),
    Mutation(
        "a token id that is too wide is not wrapped",
        "loracache/keys.py",
        "if ids.size and not np.can_cast(ids.dtype, np.int32)",
        "if not ids.size and not np.can_cast(ids.dtype, np.int32)",
        "tests/unit/test_keys.py",
    ),
    Mutation(
        "a checksum is of all buffers",
        "loracache/keys.py",
        "    for buffer in buffers:\n        state.update(buffer)",
        "    for buffer in [*buffers][:1]:\n        state.update(buffer)",
        "tests/unit/test_keys.py",
    ),
    Mutation(
        "what scales the weights is in an adapter's digest",
        "loracache/adapters/payload.py",
        'hashlib.sha256(b"loracache/adapter\\0" + settings.encode())',
        'hashlib.sha256(b"loracache/adapter\\0")',
        "tests/unit/adapters/test_adapters.py",
    ),
    Mutation(
        "every byte of the weights is in an adapter's digest",
        "loracache/adapters/payload.py",
        "            for data in folder.chunks(tensor):\n                state.update(data)",
        "            for data in folder.chunks(tensor):\n                state.update(data[:1])",
        "tests/unit/adapters/test_adapters.py",
    ),
    Mutation(
        "files that change while they are hashed have no digest",
        "loracache/adapters/payload.py",
        "if folder_identity(path) != identity:",
        "if False:",
        "tests/unit/adapters/test_adapters.py",
    ),
    Mutation(
        "a digest of files written just now is not remembered",
        "loracache/adapters/payload.py",
        "if time.time() - newest > _SETTLED_S:",
        "if True:",
        "tests/unit/adapters/test_adapters.py",
    ),
    # -- architecture ----------
    Mutation(
        "the configuration does not lead to the cache",
        "loracache/config.py",
        "from loracache.errors import",
        "from loracache.cache.state.leases import Leases\nfrom loracache.errors import",
        "tests/unit/test_architecture.py",
    ),
    Mutation(
        "a kernel imports nothing of ours",
        "kernels/page_copy/copier.py",
        "import torch\n",
        "import torch\n\nfrom loracache.errors import UsageError\n",
        "tests/unit/test_architecture.py",
    ),
]
