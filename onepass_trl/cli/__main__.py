"""``python -m onepass_trl.cli`` is the command `onepass-trl`."""

from onepass_trl.cli import main

raise SystemExit(main())
