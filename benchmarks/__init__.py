"""What this project is measured with, as `docs/performance.md` says."""

import distill  # noqa: F401 (first: it quietens what transformers imports, which modules here import before it)
