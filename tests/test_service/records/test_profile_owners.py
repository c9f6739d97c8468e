"""Promises of service.records.profile_owners.

A profile is held once by a tenant, however many jobs come to it at the same time.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from service.errors import ProfileUnknown
from service.records.profile_owners import ProfileOwners, add_owner


def test_two_jobs_that_end_at_once_with_the_same_profile_both_hold_it(database: sa.Engine) -> None:
    owners = ProfileOwners(database)
    with ThreadPoolExecutor(1) as pool:
        with database.begin() as first:
            add_owner(first, "someone", "abc")
            second = pool.submit(owners.add, "someone", "abc")
            with pytest.raises(TimeoutError):
                second.result(0.5)  # it waits for the first to end
        second.result(20)
    assert owners.all("someone") == ["abc"]


def test_a_profile_is_dropped_for_good_by_the_last_who_holds_it(database: sa.Engine) -> None:
    owners = ProfileOwners(database)
    for tenant in ("one", "other", "one"):
        owners.add(tenant, "abc")
    assert owners.remove("one", "abc") is False
    with pytest.raises(ProfileUnknown):
        owners.check("one", "abc")
    assert owners.remove("other", "abc") is True
    assert owners.all("other") == []
