"""Who sends a request: the callers that handlers depend on, by the scope that they need."""

from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from service.api.backend import BackendOfApp
from service.errors import NoCredentials, NotAllowed
from service.records.api_keys import is_key
from service.records.identity import LOCAL, Caller

_bearer = HTTPBearer(
    auto_error=False, description="An API key, or a token of the OpenID Connect provider."
)


def _caller(
    backend: BackendOfApp,
    needed: SecurityScopes,
    sent: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    """Return who sends a request.

    Raises:
        NoCredentials: nobody who is known.
        NotAllowed: they lack a scope.
    """
    if not backend.needs_key and sent is None:
        return LOCAL
    if sent is None:
        raise NoCredentials("this needs an API key: send the header 'Authorization: Bearer KEY'")
    if backend.oidc_tokens is not None and not is_key(sent.credentials):
        caller = backend.oidc_tokens.caller(sent.credentials)
    else:
        caller = backend.api_keys.caller(sent.credentials)
    missing = [scope for scope in needed.scopes if scope not in caller.scopes]
    if missing:
        raise NotAllowed(f"this needs the scope {missing[0]!r}")
    return caller


JobReader = Annotated[Caller, Security(_caller, scopes=["jobs:read"])]
JobWriter = Annotated[Caller, Security(_caller, scopes=["jobs:write"])]
ProfileReader = Annotated[Caller, Security(_caller, scopes=["profiles:read"])]
ProfileWriter = Annotated[Caller, Security(_caller, scopes=["profiles:write"])]
Solver = Annotated[Caller, Security(_caller, scopes=["allocations:solve"])]
WebhookWriter = Annotated[Caller, Security(_caller, scopes=["webhooks:write"])]
MetricsReader = Annotated[Caller, Security(_caller, scopes=["metrics:read"])]
