"""Kills, faults and full disks: whatever happens, the same command ends in the same bytes."""
