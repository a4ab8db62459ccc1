"""One recorded call, and what its operators do to the dimensions of tensors."""

__all__: list[str] = []
