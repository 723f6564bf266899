"""`python -m equipoise.run SCRIPT.py … --optimizer NAME`: an unmodified training script with one of these optimizers.

See `equipoise.hosts.script`.
"""

from equipoise.hosts.script import main

if __name__ == "__main__":
    raise SystemExit(main())
