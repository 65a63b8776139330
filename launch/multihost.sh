#!/usr/bin/env bash
# Train on several machines without a scheduler: run this command on each, with HOST_ID counting from 0. The repository and
# training.out_dir must be on a disk shared by all of them.
#   COORDINATOR=HOST0:1234 NUM_HOSTS=2 HOST_ID=0 bash launch/multihost.sh --config=configs/base.py --config.mesh.fsdp=8
: "${COORDINATOR:?expected HOST:PORT of host 0}" "${NUM_HOSTS:?expected the number of hosts}" "${HOST_ID:?expected 0 on host 0, 1 on the next, …}"
export JAX_COORDINATOR_ADDRESS=$COORDINATOR JAX_NUM_PROCESSES=$NUM_HOSTS JAX_PROCESS_ID=$HOST_ID
exec bash "$(dirname "$0")/train_node.sh" "$@"
