#!/usr/bin/env bash
# The cases behind benchmarks/results/*.jsonl, by group, on one GPU (scale37 and scale_long: two) with the packages of this project.
#
#     benchmarks/cells.sh FOLDER warm step37 step163 caps163
#
# Lines go to FOLDER/*.jsonl; what a command prints to FOLDER/NAME.log, with its status and seconds. `warm` compiles the blocks
# with two layers in processes side by side, so that those that measure after it start in seconds; first-step figures are then a
# warm cache's. A group that fails does not stop the next one; the status says that one did.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=$1
shift
mkdir -p "$OUT"
PYTHON=${PYTHON:-python3}
FAST="attention=flash4,compile=true"
RECOMPUTED="checkpointing=mlp_recomputed"
CAP23="precision=fp8,checkpointing=offload"
CAP40="precision=bf16,checkpointing=attention_saved,block_swap=40"
failed=0

# run NAME SECONDS COMMAND...: at most so long; the last line of the log says how it ended.
run() {
	local name=$1 limit=$2 start=$SECONDS status=0
	shift 2
	timeout "$limit" "$@" > "$OUT/$name.log" 2>&1 || status=$?
	echo "$name: status $status, $((SECONDS - start)) s" | tee -a "$OUT/$name.log"
	return "$status"
}

step() { run "$1" "$2" "$PYTHON" benchmarks/train_step.py --output "$OUT/train_step.jsonl" "${@:3}"; }
sample() { run "$1" "$2" "$PYTHON" benchmarks/sample_step.py --output "$OUT/sample_step.jsonl" "${@:3}"; }
encode() { run "$1" "$2" "$PYTHON" benchmarks/encode.py --output "$OUT/encode.jsonl" "${@:3}"; }
scale() {
	local launch=("$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2)
	run "$1" "$2" "${launch[@]}" benchmarks/scale.py --output "$OUT/scale.jsonl" "${@:3}"
}

warm() {
	local try
	try=(--layers 2 --warmup 1 --steps 1 --output "$(mktemp -d)/lines.jsonl")
	export TORCHINDUCTOR_COMPILE_THREADS=4
	for precision in fp8 bf16; do
		run "warm_${precision}_37" 240 "$PYTHON" benchmarks/train_step.py --frames 37 --plan "$FAST,precision=$precision,checkpointing=none" "${try[@]}" &
		run "warm_${precision}_163" 240 "$PYTHON" benchmarks/train_step.py --frames 163 --plan "$FAST,precision=$precision,$RECOMPUTED" "${try[@]}" &
	done
	run warm_cap23 240 "$PYTHON" benchmarks/train_step.py --frames 163 --plan "$FAST,$CAP23" "${try[@]}" &
	run warm_cap40 240 "$PYTHON" benchmarks/train_step.py --frames 163 --plan "$FAST,${CAP40%=40}=2" "${try[@]}" &
	wait
	unset TORCHINDUCTOR_COMPILE_THREADS
}

group() {
	case $1 in
	warm) warm ;;
	step37)
		for precision in fp8 bf16; do
			step "${precision}_37" 120 --frames 37 --plan "$FAST,precision=$precision,checkpointing=none" --profile --profile-folder "$OUT" || return
		done
		;;
	step85)
		step fp8_85 120 --frames 85 --plan "$FAST,precision=fp8,checkpointing=none" || return
		step bf16_85 120 --frames 85 --plan "$FAST,precision=bf16,$RECOMPUTED"
		;;
	step163)
		for precision in fp8 bf16; do
			step "${precision}_163" 150 --frames 163 --warmup 1 --steps 5 --plan "$FAST,precision=$precision,$RECOMPUTED" || return
		done
		;;
	caps163)
		step cap40_163 150 --frames 163 --warmup 1 --steps 5 --memory-cap-gib 40 --plan "$FAST,$CAP40" || return
		step cap23_163 150 --frames 163 --warmup 1 --steps 5 --memory-cap-gib 23 --plan "$FAST,$CAP23"
		;;
	stock) step stock 120 --frames 37 --plan "$FAST,precision=bf16,checkpointing=none" --stock ;;
	errors)
		run errors 420 "$PYTHON" benchmarks/train_step.py --errors full --errors-output "$OUT/plan_errors.jsonl" || return
		run errors_tiny 180 "$PYTHON" benchmarks/train_step.py --errors tiny --errors-output "$OUT/plan_errors.jsonl"
		;;
	vae)
		encode vae 250 --what encode decode --frames 37 163 || return
		encode vae_cap23 120 --what encode --implementation mochi-lora --frames 163 --memory-cap-gib 23
		;;
	exact) encode exact 200 --what encode decode --frames 37 --steps 1 --exact ;;
	folder) encode folder 200 --what folder --films 1280x720 1920x1080 --frames 37 --clips 24 ;;
	text) encode text 100 --what text --frames 37 ;;
	sample) sample sample 240 --frames 37 163 --steps 6 --plan "$FAST,precision=fp8,checkpointing=none" --guidance two_passes --profile --profile-folder "$OUT" ;;
	whole) sample whole 240 --whole --frames 163 --memory-cap-gib 23 --steps 4 ;;
	scale37) scale scale_37 450 --modes data shard --frames 37 --warmup 2 --steps 6 ;;
	scale_long) scale scale_long 590 --modes context --frames 163 85 --warmup 1 --steps 4 ;;
	*)
		echo "$1: no group; they are warm step37 step85 step163 caps163 stock errors vae exact folder text sample whole scale37 scale_long" >&2
		return 2
		;;
	esac
}

for name in "$@"; do
	group "$name" || failed=1
done
exit "$failed"
