"""What every other part uses: plan, errors, files, checks of untrusted values, running a module."""

__all__: list[str] = []
