"""What leaves a run: folders, files for other runtimes, and what is measured of them."""

__all__: list[str] = []
