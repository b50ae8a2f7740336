"""The launch scripts say exactly what they would run, and refuse what cannot be meant."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARGUMENTS = ("--config=configs/quickstart.py", "--workdir=runs/a b")
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch"])


def call(script, *argv, **environment):
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *argv],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def printed(script, *argv, **environment):
    done = call(script, "--dry-run", *argv, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_local_runs_training_with_its_arguments():
    assert printed("local.sh", *ARGUMENTS) == [
        r"python -m tokjax.train --config=configs/quickstart.py --workdir=runs/a\ b"
    ]


def test_processes_differ_by_their_index_alone():
    lines = printed("cpu_multiprocess.sh", "3", *ARGUMENTS, PORT="4567", DEVICES="2")
    assert len(lines) == 3
    for index, line in enumerate(lines):
        assert f"TOKJAX_PROCESS_INDEX={index} " in line
        assert line.replace(f"INDEX={index}", "INDEX=0") == lines[0]
    assert lines[0] == (
        "env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 "
        "TOKJAX_COORDINATOR=localhost:4567 TOKJAX_PROCESS_COUNT=3 TOKJAX_PROCESS_INDEX=0 "
        "TOKJAX_HOSTS=1 TOKJAX_HEARTBEAT_S=10 python -u -m tokjax.train "
        r"--config=configs/quickstart.py --workdir=runs/a\ b"
    )


@pytest.mark.parametrize("count", ["0", "two", "--config=x.py"])
def test_a_number_of_processes_that_is_none_is_refused(count):
    done = call("cpu_multiprocess.sh", count, *ARGUMENTS)
    assert done.returncode == 2
    assert f"number of processes, not '{count}'" in done.stderr


def test_a_gpu_host_sets_the_flags_of_its_preset():
    (line,) = printed("gpu_host.sh", *ARGUMENTS)
    assert line.startswith("env XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 XLA_FLAGS=")
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in line
    assert "TOKJAX_" not in line
    (line,) = printed("gpu_host.sh", *ARGUMENTS, PRESET="memory")
    assert "XLA_PYTHON_CLIENT_PREALLOCATE=false" in line
    assert "latency" not in line
    done = call("gpu_host.sh", *ARGUMENTS, PRESET="fast")
    assert done.returncode == 2
    assert "unknown PRESET=fast: choose throughput, memory or none" in done.stderr


def test_a_gpu_host_of_several_knows_the_others():
    several = {"HOSTS": "4", "HOST": "2", "COORDINATOR": "node0:9", "PRESET": "none"}
    (line,) = printed("gpu_host.sh", *ARGUMENTS, **several)
    assert (
        "TOKJAX_COORDINATOR=node0:9 TOKJAX_PROCESS_COUNT=4 TOKJAX_PROCESS_INDEX=2 TOKJAX_HOSTS=4"
        in line
    )
    done = call("gpu_host.sh", *ARGUMENTS, HOSTS="4", HOST="2")
    assert done.returncode == 2
    assert "set COORDINATOR: host:port of host 0" in done.stderr


def test_slurm_requeues_what_saved():
    done = call("slurm.sbatch", *ARGUMENTS, DRY_RUN="1", SLURM_JOB_ID="7")
    assert done.stdout.splitlines() == [
        "srun --kill-on-bad-exit=1 python -u -m tokjax.train --config=configs/quickstart.py "
        r"--workdir=runs/a\ b",
        "# with exit code 75: scontrol requeue 7",
    ]
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    assert "#SBATCH --requeue" in text
    assert "#SBATCH --signal=TERM@" in text


POD = {"POD": "mine", "ZONE": "us-west4-a", "TYPE": "v5litepod-256"}


def test_a_pod_is_made_as_asked():
    assert printed("tpu_pod.sh", "create", **POD) == [
        "gcloud compute tpus queued-resources create mine --zone us-west4-a --accelerator-type "
        "v5litepod-256 --runtime-version v2-alpha-tpuv5-lite --node-id mine"
    ]
    (line,) = printed("tpu_pod.sh", "create", **POD, SPOT="1", SLICES="2", PROJECT="p")
    assert "--project p" in line
    assert line.endswith("--spot --node-count 2 --node-prefix mine")


def test_a_pod_is_watched_from_its_creation_to_its_end():
    lines = printed("tpu_pod.sh", "watch", *ARGUMENTS, **POD)
    verbs = [" ".join(line.split()[3:6]) for line in lines if line.startswith("gcloud")]
    assert verbs == [
        "queued-resources create mine",
        "tpu-vm scp --recurse",
        "tpu-vm ssh mine",  # installs
        "tpu-vm ssh mine",  # runs
        "queued-resources delete mine",
    ]
    run = lines[3]
    assert "--worker=all" in run
    assert "TOKJAX_CLUSTER=tpu" in run
    assert "--config=configs/quickstart.py" in run


def test_every_host_gets_the_same_run_and_host_0_is_listened_to():
    (run,) = printed("tpu_pod.sh", "run", *ARGUMENTS, **POD)
    assert run.startswith("gcloud compute tpus tpu-vm ssh mine --zone us-west4-a --worker=all")
    (logs,) = printed("tpu_pod.sh", "logs", **POD)
    assert "--worker=0" in logs


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        (["create"], {}, "set POD: a name for the pod"),
        (["create"], {"POD": "a", "ZONE": "b"}, "set TYPE: the accelerator"),
        (["create"], POD | {"TYPE": "v99"}, "set VERSION"),
        (["run"], POD, "give the arguments of python -m tokjax.train"),
        (["run", "--workdir=it's"], POD, "single quote"),
        (["start"], POD, "unknown action 'start'"),
    ],
)
def test_what_a_pod_cannot_do_is_told(argv, environment, message):
    done = call("tpu_pod.sh", "--dry-run", *argv, **environment)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_says_what_it_is_for(script):
    text = script.read_text().splitlines()
    assert text[0] == "#!/usr/bin/env bash"
    assert text[1].startswith("# ")
    assert len(text[1]) > 20


def test_scripts_are_clean_by_shellcheck():
    checker = shutil.which("shellcheck")
    assert checker is not None, "pip install -e '.[test]' brings shellcheck"
    done = subprocess.run(
        [checker, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout


def test_the_manifest_for_kubernetes_can_be_read_and_runs_training():
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((ROOT / "launch" / "gke.yaml").read_text())
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][-2:] == ["-m", "tokjax.train"]
    mounted = container["volumeMounts"][0]["mountPath"]
    assert any(each.startswith(f"--workdir={mounted}/") for each in container["args"])
