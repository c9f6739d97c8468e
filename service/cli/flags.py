"""Names of flags on the command line."""

FLAGS = {
    "ties": "tie",
    "untied": "untie",
    "rules": "rule",
    "pools": "pool",
    "max_distinct": "distinct",
    "low": "from",
    "high": "to",
    "as_json": "json",
    "cache_folder": "cache",
    "needs_key": "keys",
    "out_folder": "out",
    "out_file": "out",
    "plan_file": "plan",
    "profile_folder": "profile",
}
"""Flags that are not called as the field: several of a list are given one by one."""


def flag_name(field: str) -> str:
    """Return the name of a field's flag, without the hyphens in front."""
    return FLAGS.get(field, field).replace("_", "-")
