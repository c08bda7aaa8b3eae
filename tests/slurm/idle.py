"""A script that would take a minute."""

import time

print("begins", flush=True)
time.sleep(60)
