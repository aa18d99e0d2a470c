"""`python -m serving_app` starts the prediction service.

Belongs here: nothing but the call. Does not belong here: anything else (`server`).
"""

import sys

from serving_app.server import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
