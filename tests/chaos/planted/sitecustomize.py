"""Python imports this by itself in every process whose PYTHONPATH names this folder.

So the faults reach the workers that Ray starts without a hook in the product.
"""

import os

if os.environ.get("BIGSEG_CHAOS"):
    import injector

    injector.install(os.environ["BIGSEG_CHAOS"])
