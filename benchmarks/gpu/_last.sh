mkdir -p /root/g1 /root/g2 /root/g3
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=3
f() { grep --line-buffered -v -E "oneDNN|absl::Init|UserWarning|warnings.warn|_warn_once"; }
(timeout 125 bash benchmarks/gpu.sh --out /root/g1 --part correct 2>&1 | f | sed -u 's/^/C /') & a=$!
(timeout 125 bash benchmarks/gpu.sh --out /root/g2 --part live 2>&1 | f | sed -u 's/^/L /') & b=$!
sleep 5
for x in "training --case base" decoding variants; do nice -n 19 timeout 130 python3 -m benchmarks.gpu.${x%% *} ${x#${x%% *}} --out /root/g3 --data data/gpu_demo --compile_only >/root/ahead-${x%% *}.log 2>&1 & done
wait $a $b
echo "== untimed done $SECONDS s"
pkill -f compile_only
timeout -s INT 100 bash benchmarks/gpu.sh --out /root/g3 --part training decoding variants --case base 2>&1 | f | sed -u 's/^/T /'
