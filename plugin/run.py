"""`python -m equipoise.run SCRIPT.py … --optimizer NAME`: an unmodified training script with one of these optimizers.

See `equipoise.hosts.script`.
"""

import os
import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:  # from here on modules come from where they do under `python SCRIPT.py`
        sys.path[0] = os.path.dirname(os.path.realpath("".join(sys.argv[1:2])))
    from equipoise.hosts.script import main

    raise SystemExit(main())
