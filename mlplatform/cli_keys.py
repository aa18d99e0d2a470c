"""`mlplatform keys …`: API keys of the prediction service.

Belongs here: commands, options, printing. Does not belong here: the file's form and the hash (`access_keys`), asking for a key (the
service does). A running service reads a change within two seconds, without a restart.
"""

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mlplatform.cli_options import HERE, AsJson, Home, within
from mlplatform.clock import SystemClock
from mlplatform.printing import print_json, say, table

if TYPE_CHECKING:
    from mlplatform.access_keys import AccessKey, AccessKeys, Action

keys = typer.Typer(help="API keys of the prediction service.", no_args_is_help=True, rich_markup_mode=None)

KeyId = Annotated[str, typer.Argument(metavar="ID", help="A key's id; `mlplatform keys list` shows them.")]
File = Annotated[
    Path | None,
    typer.Option(
        "--file", envvar="MLPLATFORM_SERVING_KEYS_FILE", dir_okay=False, help="File the service reads. Default: HOME/serving/keys.json"
    ),
]
_LONGEST_DAYS = 36_500
_FASTEST = 1_000_000  # requests a second
_LONGEST_NAME = 64
_ACTIONS = ("predict", "metrics", "admin")  # of `access_keys.Action`, which loads pydantic


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Who or what the key is for, as checkout-service.")],
    model: Annotated[list[str] | None, typer.Option(help="A model it may ask; may be given many times. Default: every model.")] = None,
    action: Annotated[list[str] | None, typer.Option(help=f"{', '.join(_ACTIONS)}; may be given many times. Default: predict.")] = None,
    days: Annotated[
        float | None, typer.Option(callback=within(0, _LONGEST_DAYS, above=True), help="Days until it expires. Default: never.")
    ] = None,
    start: Annotated[datetime | None, typer.Option("--not-before", help="When it begins to work, UTC. Default: now.")] = None,
    rate: Annotated[
        float | None, typer.Option(callback=within(0.001, _FASTEST), help="Requests a second, per replica. Default: no limit.")
    ] = None,
    burst: Annotated[
        int | None, typer.Option(min=1, max=_FASTEST, help="Requests at once within the rate. Default: one second's worth.")
    ] = None,
    quota: Annotated[
        int | None, typer.Option(min=1, max=10**12, help="Requests a day (UTC), over all replicas. Default: no limit.")
    ] = None,
    file: File = None,
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. It is shown this once: only its hash is kept."""
    from mlplatform import access_keys

    if unknown := sorted(set(action or ()) - set(_ACTIONS)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(_ACTIONS)}", param_hint="--action")
    if burst is not None and rate is None:
        raise typer.BadParameter("needs --rate", param_hint="--burst")
    if not 0 < len(name) <= _LONGEST_NAME:
        raise typer.BadParameter(f"1 to {_LONGEST_NAME} characters", param_hint="NAME")
    if "" in (model or ()):
        raise typer.BadParameter("a model has a name", param_hint="--model")
    now = SystemClock().now()
    begins = start.replace(tzinfo=UTC) if start else None
    expires = now + timedelta(days=days) if days is not None else None
    if begins is not None and expires is not None and expires <= begins:
        raise typer.BadParameter(
            f"it would expire on {expires:%Y-%m-%d %H:%M} UTC, before it begins to work on {begins:%Y-%m-%d %H:%M}", param_hint="--days"
        )
    secret = access_keys.new_secret()
    key = access_keys.AccessKey(
        id=access_keys.new_id(),
        name=name,
        models=tuple(model or (access_keys.EVERY_MODEL,)),
        actions=cast("tuple[Action, ...]", tuple(action or ("predict",))),
        not_before=begins,
        expires_at=expires,
        rate_per_s=rate,
        burst=burst or (max(1, math.ceil(rate)) if rate else None),
        daily_quota=quota,
        secrets=(access_keys.HashedSecret(sha256=access_keys.hash_secret(secret), created_at=now),),
    )
    path = _path(file, home)
    with access_keys.locked(path) as found:
        access_keys.write(path, found.with_key(key))
    _show_once(key, secret, path, as_json)


@keys.command("list")
def list_keys(file: File = None, home: Home = HERE, as_json: AsJson = False) -> None:
    """Every key: what it may do, and whether it works. Never a secret."""
    from mlplatform import access_keys

    path = _path(file, home)
    found = access_keys.read(path) if path.exists() else access_keys.AccessKeys()
    rows = [_row(key, SystemClock().now()) for key in found.keys]
    if as_json:
        print_json(rows)
        return
    table("keys", [_line(row) for row in rows], empty=f"{path} holds none: `mlplatform keys create NAME`")


@keys.command()
def revoke(key_id: KeyId, file: File = None, home: Home = HERE) -> None:
    """End a key now. Its record stays, so that logs can still be read."""
    from mlplatform import access_keys

    path = _path(file, home)
    with access_keys.locked(path) as found:
        key = _known(found, key_id)
        at = key.revoked_at or SystemClock().now()
        access_keys.write(path, found.with_key(key.model_copy(update={"revoked_at": at})))
    say(f"{key.name} ({key.id}) is revoked; running services refuse it within two seconds")


@keys.command()
def rotate(
    key_id: KeyId,
    grace_h: Annotated[float, typer.Option(callback=within(0, 8_760), help="Hours the secret before goes on working.")] = 24.0,
    file: File = None,
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """Give a key a new secret and print it once; the one before works on for a while, so that no caller is shut out."""
    from mlplatform import access_keys

    path = _path(file, home)
    now = SystemClock().now()
    secret = access_keys.new_secret()
    with access_keys.locked(path) as found:
        key = _known(found, key_id)
        if key.revoked_at is not None:
            raise typer.BadParameter(f"{key.id} is revoked: make a new key", param_hint="ID")
        key = access_keys.rotated(key, secret, now, now + timedelta(hours=grace_h))
        access_keys.write(path, found.with_key(key))
    _show_once(key, secret, path, as_json)


def _path(file: Path | None, home: Path) -> Path:
    from mlplatform import access_keys

    return (file or home / access_keys.KEYS_FILE).absolute()


def _known(found: "AccessKeys", key_id: str) -> "AccessKey":
    for key in found.keys:
        if key.id == key_id:
            return key
    raise typer.BadParameter(f"there is no key {key_id!r}; `mlplatform keys list` shows them", param_hint="ID")


def _show_once(key: "AccessKey", secret: str, path: Path, as_json: bool) -> None:
    from mlplatform import access_keys

    text = access_keys.written(key.id, secret)
    if as_json:
        print_json(_row(key, SystemClock().now()) | {"key": text})
        return
    say(f"{key.name} ({key.id}) is in {path}. Its key, shown this once:")
    typer.echo(text)


def _row(key: "AccessKey", now: datetime) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "state": _state(key, now),
        "models": list(key.models),
        "actions": list(key.actions),
        "expires_at": key.expires_at.isoformat() if key.expires_at else None,
        "rate_per_s": key.rate_per_s,
        "burst": key.burst,
        "daily_quota": key.daily_quota,
        "secrets": sum(s.until is None or s.until > now for s in key.secrets),
    }


def _line(row: dict[str, Any]) -> dict[str, Any]:
    """What fits a terminal; the rest is in the JSON."""
    models = "every model" if row["models"] == ["*"] else ", ".join(row["models"])
    limits = {"rate_per_s": "{:g}/s", "burst": "{} at once", "daily_quota": "{:,} a day"}
    return {
        "id": row["id"],
        "name": row["name"],
        "state": row["state"] + (f", {row['secrets']} secrets" if row["secrets"] > 1 else ""),
        "may": f"{', '.join(row['actions'])}: {models}",
        "expires": "never" if row["expires_at"] is None else row["expires_at"][:10],
        "limits": ", ".join(form.format(row[name]) for name, form in limits.items() if row[name] is not None) or "none",
    }


def _state(key: "AccessKey", now: datetime) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.not_before is not None and now < key.not_before:
        return "not yet"
    return "expired" if key.expires_at is not None and now >= key.expires_at else "valid"
