"""The error of an invalid setting."""


class ConfigError(ValueError):
    """An invalid setting; the message names it, what it must be, and what it is."""


def require(holds: bool, name: str, wanted: str, got: object) -> None:
    """Raise a `ConfigError` unless the condition holds."""
    if not holds:
        raise ConfigError(f"{name} must be {wanted}, got {got}")
