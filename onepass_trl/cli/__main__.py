"""``python -m onepass_trl.cli``, the same as the command `onepass-trl`."""

from onepass_trl.cli import main

raise SystemExit(main())
