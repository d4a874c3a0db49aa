"""A program: a Ray cluster of two nodes on this machine, until its input ends.

It says on one line of JSON where the cluster is, and which process to kill to lose a node. Not a
fixture, because Ray reads once in a process whether clusters ask for a token (ray 2.60).
"""

import json
import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = cluster.add_node(num_cpus=1)
        raylet = node.all_processes["raylet"][0].process.pid
        sys.stdout.write(json.dumps({"address": cluster.address, "raylet": raylet}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        cluster.shutdown()
