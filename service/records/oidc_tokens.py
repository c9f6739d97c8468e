"""Tokens of an OpenID Connect provider."""

from typing import Any
from urllib.parse import urlsplit

import httpx2
import jwt

from service.errors import NoCredentials, RequestError
from service.records.identity import MAX_TENANT_CHARACTERS, SCOPES, Caller

_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA")
_LEEWAY_SECONDS = 30
_TIMEOUT_SECONDS = 5


class OidcTokens:
    """Tokens of one provider.

    The claim `tenant`, or else `sub`, names the tenant; `scope` lists the scopes.
    """

    def __init__(self, issuer: str, audience: str | None) -> None:
        """Accept tokens that `issuer` issued for `audience`; nothing is fetched yet.

        Raises:
            RequestError: the audience is missing, or the issuer is not reached by https.
        """
        if not audience:
            raise RequestError(
                "BITWRIGHT_OIDC_AUDIENCE is missing; without it, tokens issued for others would be "
                "accepted"
            )
        parts = urlsplit(issuer)
        if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise RequestError(f"issuer {issuer!r} is not reached by https; give its https address")
        self._issuer = issuer
        self._audience = audience
        self._keys: jwt.PyJWKClient | None = None

    def caller(self, token: str) -> Caller:
        """Return who a token speaks for.

        Raises:
            NoCredentials: it is not valid, or the provider does not answer.
        """
        try:
            claims = self._claims(token)
        except (jwt.PyJWTError, httpx2.HTTPError, KeyError, ValueError) as error:
            raise NoCredentials(f"the token is not accepted: {type(error).__name__}") from error
        tenant = str(claims.get("tenant") or claims.get("sub") or "")[:MAX_TENANT_CHARACTERS]
        if not tenant.isprintable() or not tenant:
            raise NoCredentials(
                "the token names neither a tenant nor a subject that can be printed"
            )
        return Caller(tenant, frozenset(str(claims.get("scope", "")).split()) & frozenset(SCOPES))

    def _claims(self, token: str) -> dict[str, Any]:
        """Return the claims of a token after checking its signature, issuer and audience."""
        if self._keys is None:
            address = f"{self._issuer.rstrip('/')}/.well-known/openid-configuration"
            found = httpx2.get(address, timeout=_TIMEOUT_SECONDS).raise_for_status()
            self._keys = jwt.PyJWKClient(found.json()["jwks_uri"], timeout=_TIMEOUT_SECONDS)
        claims: dict[str, Any] = jwt.decode(
            token,
            self._keys.get_signing_key_from_jwt(token).key,
            algorithms=_ALGORITHMS,
            audience=self._audience,
            issuer=self._issuer,
            leeway=_LEEWAY_SECONDS,
            options={"require": ["exp", "iss", "aud"]},
        )
        return claims
