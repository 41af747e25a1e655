"""The launchers: what they start, what they pass on, what they say; slurm.sh against a real SLURM."""

import copy
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from cluster import ROOT, TINY, Run, rows, saved

from raddino_jax import logs

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.name != "venv.sh")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_launcher_says_how_to_use_it(name):
    head = (LAUNCH / name).read_text()[:1500]
    use = f"kubectl apply -f launch/{name}" if name.endswith("yaml") else f"launch/{name}"
    assert use in head and "#  " in head
    if name.endswith("sh"):
        assert head.startswith("#!/usr/bin/env bash\n") and os.access(LAUNCH / name, os.X_OK)
        subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)


# --- local.sh --------------------------------------------------------------------------------------------------------


def local(processes, *words: str, logs_in: Path) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": "", "PYTHON": sys.executable, "LOGS": str(logs_in)}
    command = ["bash", str(LAUNCH / "local.sh"), str(processes), *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd="/")


@pytest.mark.slow
def test_local_runs_n_processes_and_passes_sigterm_on(tmp_path):
    workdir = tmp_path / "run"
    process = local(2, *TINY, "--config.steps=100000", f"--workdir={workdir}", logs_in=tmp_path)
    end = time.monotonic() + 240
    while len(logs.read_metrics(workdir)) < 3:
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "host-1.log").read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "2 x cpu of 2 processes" in err and f"step {saved(workdir)[-1]} is saved" in err


@pytest.mark.slow
def test_local_ends_with_the_code_of_a_run_that_is_refused_and_refuses_no_number(tmp_path):
    process = local(2, *TINY, "--config.group_size=3", f"--workdir={tmp_path / 'run'}", logs_in=tmp_path)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2 and "group_size" in err
    process = local("--config=x", logs_in=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "number of processes first" in err


# --- tpu_vm.sh -------------------------------------------------------------------------------------------------------


def test_tpu_vm_runs_one_command_on_all_workers_with_every_word_whole(tmp_path):
    """What gcloud would get, and what the worker's shell makes of it."""
    words = ["--config=configs/multicxr.py", "--config.data.sources=('folder:/a b',)"]
    environment = os.environ | {"TPU": "pod", "ZONE": "here-a", "DRY_RUN": "1", "CHECKOUT": "my code"}
    out = subprocess.run(
        ["bash", str(LAUNCH / "tpu_vm.sh"), *words], env=environment, capture_output=True, text=True, check=True
    ).stdout
    command = shlex.split(out)
    assert command[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=here-a"]
    assert "--worker=all" in command
    remote = command[-1].removeprefix("--command=")
    assert shlex.split(remote) == [
        "cd", "my code", "&&", "exec", ".venv/bin/python", "-m", "raddino_jax.main", *words
    ]
    bare = subprocess.run(["bash", str(LAUNCH / "tpu_vm.sh")], env=os.environ | {"TPU": ""}, capture_output=True)
    assert bare.returncode != 0 and b"name of the TPU VM" in bare.stderr


# --- gke_jobset.yaml -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def understood(manifest: dict) -> dict:
    """The manifest through models generated from the published schemas of JobSet and Kubernetes.

    Wrong types and missing fields are an error; names that the schemas do not know are dropped.
    """
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    return strings(models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict())


def test_the_jobset_fits_its_published_schema(jobset):
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert understood(jobset) == strings(jobset)


def test_the_jobset_for_gpus_is_made_as_its_header_says_and_fits_the_schema_too(jobset):
    lines = (LAUNCH / "gke_jobset.yaml").read_text().splitlines()
    said = dict(found.groups() for line in lines if (found := re.match(r"#   (\w+) +(\S+: \S+)$", line)))
    gpu = copy.deepcopy(jobset)
    pod = gpu["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["nodeSelector"] = yaml.safe_load(said["nodeSelector"])
    number = yaml.safe_load(said["resources"])
    pod["containers"][0]["resources"] = {"requests": number, "limits": number}
    del gpu["metadata"]["annotations"]
    assert list(number) == ["nvidia.com/gpu"] and "gke-accelerator" in str(pod["nodeSelector"])
    assert understood(gpu) == strings(gpu)


@pytest.mark.parametrize(
    "place, key, value",
    [
        ((), "replicatedJob", []),
        (("replicatedJobs", 0), "replica", 1),
        (("replicatedJobs", 0, "template", "spec"), "completionmode", "Indexed"),
        (("replicatedJobs", 0, "template", "spec"), "parallelism", "eight"),
        (("replicatedJobs", 0, "template", "spec", "template", "spec"), "nodeselector", {}),
        (("replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0), "name", None),
        (("replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "ports", 0), "port", 1),
        (("failurePolicy",), "maxRestarts", "often"),
        (("network",), "enableDNSHostnames", "perhaps"),
    ],
)
def test_a_wrong_jobset_does_not_fit_the_schema(jobset, place, key, value):
    """The comparison above would pass anything if the models did."""
    wrong = copy.deepcopy(jobset)
    there = wrong["spec"]
    for step in place:
        there = there[step]
    there[key] = value
    try:
        assert understood(wrong) != strings(wrong)
    except ValueError:
        pass


def strings(tree):
    """Quantities are strings to Kubernetes, and YAML's numbers as good."""
    if isinstance(tree, dict):
        return {key: strings(value) for key, value in tree.items()}
    return [strings(value) for value in tree] if isinstance(tree, list) else str(tree)


def test_the_jobset_starts_as_many_processes_as_it_tells_them_and_tells_each_its_number(jobset):
    (hosts,) = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    given = dict(word.partition("=")[::2] for word in container["command"] if word.startswith("--"))
    assert job["parallelism"] == job["completions"] == int(given["--processes"])
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never", "a process alone cannot join again"
    known = {variable["name"] for variable in container["env"]}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["command"]))) <= known
    # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain, by default the jobset's name>
    assert given["--coordinator"] == f"$(JOBSET_NAME)-{hosts['name']}-0-0.$(JOBSET_NAME):8476"
    assert {"containerPort": 8476, "protocol": "TCP"} in container["ports"]
    assert given["--process"] == "$(JOB_COMPLETION_INDEX)"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    rows_, columns = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    assert int(rows_) * int(columns) == chips * job["parallelism"]


# --- slurm.sh --------------------------------------------------------------------------------------------------------

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 Gres=gpu:1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=10
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """One controller and two node daemons on this machine; gives the environment in which its commands work."""
    needed = ("munged", "slurmctld", "slurmd", "sbatch")
    if os.getuid() or not all(shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") for name in needed):
        pytest.skip("needs root and Debian's packages slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    (folder / "state").mkdir()
    ports = dict(zip(("port", "port1", "port2"), (port() for _ in range(3)), strict=True))
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(folder=folder, host=socket.gethostname().partition(".")[0], **ports))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    names = {"key-file": key, "socket": folder / "munge.socket"}
    names |= {f"{name}-file": folder / f"munge.{name}" for name in ("pid", "log", "seed")}
    commands = [
        ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in names.items())],
        ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"],
    ]
    daemons = []
    with (folder / "daemons.log").open("w") as log:
        for command in commands:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(2)
    yield environment, folder
    subprocess.run(["scancel", "--user=root"], env=environment)  # a job outlives the daemon that started it
    until(lambda: not subprocess.run(["squeue", "-h"], env=environment, capture_output=True).stdout, lambda: "", 90)
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in daemons:
        daemon.wait(timeout=30)


def port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def job(environment, number: str) -> dict[str, str]:
    text = subprocess.run(["scontrol", "show", "job", number], env=environment, capture_output=True, text=True).stdout
    return dict(word.partition("=")[::2] for word in text.split() if "=" in word)


def until(condition, what: str, seconds: float = 420) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"waited in vain for {what()}"
        time.sleep(0.5)
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_slurm_job_that_is_preempted_or_out_of_time_saves_queues_again_and_ends_as_if_nothing_had_been(
    slurm, tmp_path
):
    environment, folder = slurm
    until(lambda: "idle" in subprocess.run(["sinfo", "-h"], env=environment, capture_output=True, text=True).stdout,
          lambda: (folder / "daemons.log").read_text(), 60)
    workdir, log = tmp_path / "run", tmp_path / "job.log"
    words = ["--config.steps=600", "--config.checkpoint_every=200"]
    # Both nodes are this machine: their names resolve nowhere, so the address of task 0 is given.
    address = f"127.0.0.1:{port()}"
    told = environment | {"PYTHON": sys.executable, "JAX_COORDINATOR_ADDRESS": address, "XLA_FLAGS": ""}
    submit = ["sbatch", "--parsable", f"--output={log}"]
    number = subprocess.run(
        [*submit, "--partition=low", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1",
         "--time=60", str(LAUNCH / "slurm.sh"), *TINY, *words, f"--workdir={workdir}"],
        env=told, cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip

    def state() -> str:
        return (log.read_text() if log.exists() else "no log") + str(job(environment, number)) + (
            folder / "slurmctld.log"
        ).read_text()[-3000:]

    seconds = []
    for kind in ("out of time", "preempted"):
        before = len(logs.read_metrics(workdir))
        until(lambda before=before: len(logs.read_metrics(workdir)) > before + 5, state)
        began, starts = time.monotonic(), int(job(environment, number)["Restarts"])
        if kind == "preempted":
            quick = [*submit[:2], f"--output={tmp_path / 'quick.log'}", "--partition=high", "--nodes=2", "--wrap=true"]
            subprocess.run([*quick, "--exclusive"], env=environment, check=True, capture_output=True, cwd=ROOT)
        else:  # the very signal that --signal=B:USR1@300 asks for
            subprocess.run(["scancel", "--batch", "--signal=USR1", number], env=environment, check=True)
        until(lambda starts=starts: int(job(environment, number).get("Restarts", 0)) > starts, state)
        until(lambda: job(environment, number)["JobState"] == "RUNNING", state)
        seconds.append(time.monotonic() - began)
        newest = saved(workdir)[-1]
        assert newest > before and f"step {newest} is saved" in log.read_text(), state()
    until(lambda: job(environment, number)["JobState"] == "COMPLETED", state, 900)
    print(f"two resubmissions; seconds from the signal to the next start: {', '.join(f'{s:.0f}' for s in seconds)}")
    assert log.read_text().count("queued again") == 2 and log.read_text().count("resumed from step") == 2
    whole = Run(tmp_path / "whole", *words, processes=2)
    whole.finish()
    ours, wanted = rows(workdir), rows(tmp_path / "whole")
    assert [row["step"] for row in ours] == list(range(1, 601))
    # Not to the last digit, as in faults_of_processes_test: SLURM gives a process cores of its own, and with another
    # number of them sums are split otherwise.
    for name in ("loss", "dino_global", "dino_local", "ibot", "grad_norm_backbone"):
        np.testing.assert_allclose([row[name] for row in ours], [row[name] for row in wanted], rtol=1e-5, err_msg=name)
