"""Saves that die or fail at every point, disks that lose power, and what a fresh reader finds afterwards.

python -m integration.faults          every part, as one table (--help names the parts)
python -m integration.faults soak     SIGKILL at random moments

The parts: `points` numbers the operations of a save and breaks each of them; `power` works out what a disk may hold
after a power cut; `http` breaks the requests to a real S3 server; `strace` breaks real system calls; `full` fills a
file system; `soak` kills and restarts processes.
"""
