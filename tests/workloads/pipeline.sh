# SPDX-License-Identifier: Apache-2.0
# pipeline.sh OUTFILE: a shell pipeline that counts, with a short-lived process for every line.
#
# Lines as in workload.h; "tick N SUM" must come for every N, once and in order.
out=$1
rm -f "$out.stop"

count() {
	n=0
	while [ ! -e "$out.stop" ]; do
		n=$((n + 1))
		echo "$n"
		sleep 0.01
	done
}

verify() {
	sum=0
	last=0
	while read -r n word; do
		sum=$((sum + n))
		if [ "$n" != $((last + 1)) ] || [ "$word" != "line" ] || [ $sum != $((n * (n + 1) / 2)) ]; then
			echo "FAIL pid=$$ line $n $word after $last, sum $sum" >> "$out"
			exit 1
		fi
		last=$n
		echo "tick $n $sum" >> "$out"
	done
}

trap 'touch "$out.stop"' TERM
echo "ready pid=$$" >> "$out"  # ahead of the first tick
count | sed -u 's/$/ line/' | cat | verify &
# A trapped signal ends the first wait early.
wait $!
wait $! && echo ok >> "$out"
