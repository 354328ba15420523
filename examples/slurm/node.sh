#!/usr/bin/env bash
# One node of a job: run a launch script, and turn Slurm's signals into one SIGTERM for its torchrun.
#
#   node.sh SCRIPT [FLAGS]
#
# torchrun passes SIGTERM on to its ranks, waits for them (they save and exit) and starts nothing again. USR1
# alone would kill it, and ranks that got it themselves would be restarted. Exit code: 0 where the training came
# to its end, 138 after USR1, 143 after TERM, else torchrun's.

set -euo pipefail

stopped=0
# shellcheck disable=SC2329  # called by the traps
stop() {
    # Once: a second signal would break torchrun off while it waits.
    [ "$stopped" = 0 ] || return 0
    stopped=$1
    kill -TERM "$child" 2> /dev/null || true
}

# The script and its torchrun ignore USR1, which Slurm may send to every process; the ranks handle it.
(
    trap '' USR1
    exec bash "$@"
) &
child=$!
trap 'stop 138' USR1
trap 'stop 143' TERM INT

code=0
while true; do
    code=0
    wait "$child" || code=$?
    # A trap ends a wait early.
    kill -0 "$child" 2> /dev/null || break
done
if [ "$code" != 0 ] && [ "$stopped" != 0 ]; then
    code=$stopped
fi
exit "$code"
