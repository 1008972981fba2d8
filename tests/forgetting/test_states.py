"""States: what may follow what, and what each request is after it."""

import pytest
from services import apply_entry, bake_entry, base_entry, request, revoke_entry

from postgrad.errors import ArtefactError
from postgrad.forgetting.entries import GENESIS, Body, Entry, PurgeBody, VerifyBody, digest
from postgrad.forgetting.ledger import BaseState
from postgrad.forgetting.states import states

BASE, OTHER = digest("base"), digest("other")
FIRST = base_entry(BaseState(BASE, digest("record")))


def apply(name: str, base: str = BASE) -> Body:
    return apply_entry(request(name, "8"), base, {}, 1)


def revoke(name: str) -> Body:
    return revoke_entry(name, BASE)


def bake(*names: str) -> Body:
    return bake_entry(BASE, *names)


def purge(name: str, manifest: str = "") -> Body:
    return PurgeBody(request=name, manifest_hash=manifest or _manifest(name), num_files=1, code_version="1.0")


def _manifest(name: str) -> str:
    return apply_entry(request(name, "8"), BASE, {}, 1).manifest_hash


def after(*bodies: Body) -> dict[str, str]:
    return dict(states([Entry(i, GENESIS, "", body, GENESIS) for i, body in enumerate(bodies)]))


def test_the_way_of_a_request() -> None:
    assert after() == after(FIRST) == {}
    assert after(FIRST, apply("a")) == {"a": "active"}
    assert after(FIRST, apply("a"), apply("b")) == {"a": "frozen", "b": "active"}
    assert after(FIRST, apply("a"), apply("b"), revoke("a")) == {"a": "revoked", "b": "active"}
    assert after(FIRST, apply("a"), apply("b"), revoke("b")) == {"a": "frozen", "b": "revoked"}
    assert after(FIRST, apply("a"), apply("b"), bake("a", "b")) == {"a": "baked", "b": "baked"}
    new = apply("c", digest("baked"))
    assert after(FIRST, apply("a"), bake("a"), new) == {"a": "baked", "c": "active"}
    verify = VerifyBody(base_hash=BASE, num_requests=1, num_findings=0, metrics={}, code_version="1.0")
    assert after(FIRST, apply("a"), verify, purge("a"), revoke("a")) == {"a": "revoked"}


@pytest.mark.parametrize(
    ("bodies", "message"),
    [
        ((apply("a"),), r"entry 0 \(apply\): the first entry, and no other, must be the base"),
        ((FIRST, FIRST), r"entry 1 \(base\): the first entry"),
        ((FIRST, apply("a", OTHER)), r"entry 1 \(apply\): expected the base"),
        ((FIRST, apply("a"), bake("a"), apply("b")), r"entry 3 \(apply\): expected the base"),
        ((FIRST, apply("a"), apply("a")), r"request 'a' was applied before and is active. Give the new request an id"),
        ((FIRST, apply("a"), revoke("a"), apply("a")), r"'a' was applied before and is revoked"),
        ((FIRST, apply("req1"), revoke("req2")), r"no request 'req2' was applied. Nearest is 'req1'"),
        ((FIRST, revoke("a")), r"no request 'a' was applied. Known: none"),
        ((FIRST, apply("a"), revoke("a"), revoke("a")), r"'a' is revoked already and cannot be revoked"),
        ((FIRST, apply("a"), revoke("a"), bake("a")), r"'a' is revoked already and cannot be baked"),
        ((FIRST, apply("a"), bake("a", "a")), r"'a' is baked into the base .* would add its change twice"),
        ((FIRST, apply("a"), bake("a", "b")), r"no request 'b' was applied"),
        ((FIRST, apply("a"), bake()), r"expected requests to bake, found none"),
        ((FIRST, purge("a")), r"no request 'a'"),
        ((FIRST, apply("a"), purge("a"), purge("a")), r"'a' were purged before"),
        ((FIRST, apply("a"), purge("a", OTHER)), r"not the data of request 'a'"),
    ],
)
def test_what_cannot_follow_is_refused(bodies: tuple[Body, ...], message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        after(*bodies)


def test_what_is_baked_stays() -> None:
    baked = bake("a")
    later = revoke_entry("a", digest("baked"))
    with pytest.raises(ArtefactError, match="'a' is baked into the base and cannot be revoked"):
        after(FIRST, apply("a"), baked, later)
    twice = bake_entry(digest("baked"), "a")
    with pytest.raises(ArtefactError, match=r"cannot be baked\. A second merge would add its change twice"):
        after(FIRST, apply("a"), baked, twice)
