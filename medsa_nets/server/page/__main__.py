"""Fetch what the server's page needs: ``python -m medsa_nets.server.page``."""

import sys

from medsa_nets.server.page import main

sys.exit(main())
