"""`launch ... --dry-run`: what each executor would submit, line by line where it matters; and bad input."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_coreward.config.load import load_config, parse_config
from megatron_coreward.errors import InputError
from tests.launch.arguments import CLUSTERS, launch_command, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore")
needs_kubernetes = pytest.mark.skipif(
    importlib.util.find_spec("kubernetes") is None, reason="the Python package kubernetes is not installed"
)
needs_skypilot = pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="SkyPilot is not installed")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def preview(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    launch_command(*words, "--dry-run")
    return capsys.readouterr().out


def files_of(text: str) -> dict[str, str]:
    """The files of a preview by their names."""
    parts = text.split("# ==> ")[1:]
    return {Path(part.partition("\n")[0]).name: part.partition("\n")[2] for part in parts}


def slurm_file(folder: Path, text: str) -> str:
    path = folder / "cluster.yaml"
    path.write_text(f"kind: slurm\n{text}")
    return str(path)


class TestSlurmWithoutContainers:
    def test_the_batch_script(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("--nodes", "4", "--gpus-per-node", "8", "--cluster", str(CLUSTERS / "slurm.yaml"))
        text = preview(capsys, "slurm", str(recipe), *words, "--time", "2-00:00:00")
        script = files_of(text)["job.sbatch"].splitlines()
        for flag in (
            "account=research",
            "partition=gpu",
            "exclusive",
            "nodes=4",
            "ntasks-per-node=1",
            "gpus-per-node=8",
            "time=2-00:00:00",
            "signal=TERM@300",
            "job-name=run-1",
            "open-mode=append",
        ):
            assert f"#SBATCH --{flag}" in script
        assert "trap requeue_if_stopped ERR" in script
        assert '        scontrol requeue "$SLURM_JOB_ID" && sleep 60' in script
        assert "export TORCHX_MAX_RETRIES=0" in script  # nemo-run's own requeue would repeat bad input too
        directory = recipe.parent / "Run_1" / "launch"
        assert any(line.startswith("srun ") and line.endswith(f"bash {directory}/node.sh") for line in script)
        assert text.rstrip().endswith(f"sbatch --requeue --parsable {directory}/job.sbatch")

    def test_every_node_starts_ray_and_waits_for_all(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cluster = str(CLUSTERS / "slurm.yaml")
        node = files_of(
            preview(capsys, "slurm", str(recipe), "--nodes", "4", "--gpus-per-node", "8", "--cluster", cluster)
        )["node.sh"]
        assert "module load cuda/13.0\n" in node
        assert "--num-gpus=8" in node
        assert 'until [ "$(up)" -ge 4 ]' in node

    def test_secrets_are_named_and_never_read(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        secret = tmp_path / "token"
        secret.write_text("hush-hush")
        cluster = slurm_file(tmp_path, f"secrets: {{SOME_TOKEN: {{file: {secret}}}}}\n")
        text = preview(capsys, "slurm", str(write_recipe(tmp_path)), "--cluster", cluster)
        assert f"--secret SOME_TOKEN={secret}" in files_of(text)["driver.sh"]
        assert "hush-hush" not in text
        assert "ray_token" in text

    def test_values_of_the_environment_are_quoted(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cluster = slurm_file(tmp_path, "env: {NOTE: \"a b; $(touch /tmp/x) 'c'\"}\n")
        script = files_of(preview(capsys, "slurm", str(write_recipe(tmp_path)), "--cluster", cluster))["job.sbatch"]
        assert "export NOTE='a b; $(touch /tmp/x) '\"'\"'c'\"'\"''" in script

    def test_the_recipe_that_runs_is_the_resolved_one(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = files_of(preview(capsys, "slurm", str(recipe), "actor.lr=1e-5"))["config.yaml"]
        assert parse_config(yaml.safe_load(text)) == load_config(recipe, ["actor.lr=1e-5"])

    def test_other_options_are_handed_on(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cluster = slurm_file(tmp_path, "sbatch: {reservation: maintenance, mail_user: me, exclude: 'n[1-3]'}\n")
        script = files_of(preview(capsys, "slurm", str(write_recipe(tmp_path)), "--cluster", cluster))["job.sbatch"]
        for line in ("--reservation=maintenance", "--mail-user=me", "--exclude='n[1-3]'"):
            assert f"#SBATCH {line}" in script.splitlines()

    @pytest.mark.parametrize("folder", ["a b", "it's", "a \"b\" 'c'", "50%/$5 $(id)", "nemo_run/x", "é"])
    def test_paths_reach_every_command_as_one_word(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
    ) -> None:
        recipe = write_recipe(tmp_path)
        directory = tmp_path / folder / "run" / "launch"
        text = preview(capsys, "slurm", str(recipe), f"run_dir={json.dumps(str(directory.parent))}")
        script = files_of(text)["job.sbatch"].splitlines()
        (srun,) = (line for line in script if line.startswith("srun --output"))
        words, logs = shlex.split(srun), str(directory / "logs").replace("%", "%%")
        assert words[:5] == [
            "srun",
            "--output",
            f"{logs}/log-run_%j_${{SLURM_RESTART_COUNT:-0}}.out",
            "--chdir",
            str(directory / "code"),
        ]
        assert words[-2:] == ["bash", str(directory / "node.sh")]
        (output,) = (line for line in script if line.startswith("#SBATCH --output="))
        assert shlex.split(output.removeprefix("#SBATCH ")) == [f"--output={logs}/sbatch_run_%j.out"]
        assert shlex.split(text.rstrip().splitlines()[-1])[-1] == str(directory / "job.sbatch")
        assert "COREWARD_PARENT" not in text
        for name in ("job.sbatch", "node.sh", "driver.sh"):
            done = subprocess.run(
                ["bash", "-n"], input=files_of(text)[name], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr

    def test_without_gpus_none_are_asked_for(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        files = files_of(preview(capsys, "slurm", str(recipe)))
        assert "--gpus" not in files["job.sbatch"]
        assert "--num-gpus=0" in files["node.sh"]

    def test_colocated_actors_and_engines_count_once(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("slurm", str(recipe), "rollout.placement=colocated", "--gpus-per-node", "1")
        assert "#SBATCH --gpus-per-node=1" in files_of(preview(capsys, *words))["job.sbatch"].splitlines()


class TestSlurmWithContainers:
    @pytest.fixture
    def files(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
        cluster = str(CLUSTERS / "slurm-containers.yaml")
        words = ("--nodes", "2", "--gpus-per-node", "8", "--cluster", cluster, "--name", "long-run")
        return files_of(preview(capsys, "slurm", str(recipe), "run_dir=long", *words))

    def test_ray_runs_in_the_image_with_the_mounts(self, files: dict[str, str]) -> None:
        assert "node.sh" not in files
        started = [line for line in files["job.sbatch"].splitlines() if "--container-image" in line]
        assert len(started) == 2  # head and workers
        for line in started:
            assert "--container-image=/lustre/images/coreward-gpu.sqsh" in line
            assert "/lustre/runs:/lustre/runs,/lustre/models:/lustre/models" in line
            assert "--gres=gpu:8" in line
        assert 'COMMAND="${COMMAND:-bash /lustre/runs/launch/long-run/driver.sh}"' in files["job.sbatch"]

    def test_steps_have_account_and_partition_from_their_job(
        self, tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "#SBATCH --account=research" in files["job.sbatch"].splitlines()
        cluster = slurm_file(tmp_path, f"image: x.sqsh\nmounts: ['{tmp_path}:{tmp_path}']\n")
        neither = files_of(preview(capsys, "slurm", str(write_recipe(tmp_path)), "--cluster", cluster))
        for script in (files["job.sbatch"], neither["job.sbatch"]):
            assert not re.search(r"srun .*container-image.* (-A|-p)=", script)

    def test_a_signal_reaches_the_training_and_not_ray(self, files: dict[str, str]) -> None:
        script = files["job.sbatch"]
        assert "#SBATCH --signal=TERM@300" in script
        head, workers = script.index("head_cmd=$("), script.index("worker_cmd=$(")
        assert head < script.index("trap '' TERM USR1") < workers < script.rindex("trap '' TERM USR1")

    def test_the_job_requeues_itself_and_the_training_finds_ray(self, files: dict[str, str]) -> None:
        script = files["job.sbatch"]
        assert script.index("ip_head=") < script.index('export COREWARD_RAY_HEAD="$ip_head"')
        assert "trap requeue_if_stopped ERR" in script
        assert 'export RAY_ADDRESS="$COREWARD_RAY_HEAD"' in files["driver.sh"]
        assert "cd /lustre/runs\nexec python -m megatron_coreward.attempt" in files["driver.sh"]


class TestLocal:
    def test_the_driver(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        files = files_of(preview(capsys, "local", str(recipe), "--cluster", str(CLUSTERS / "local.yaml")))
        assert "export OMP_NUM_THREADS=1\n" in files["driver.sh"]
        assert "-m megatron_coreward.attempt" in files["driver.sh"]


@needs_kubernetes
class TestKubernetes:
    def manifest(self, capsys: pytest.CaptureFixture[str], recipe: Path, *words: str) -> Any:
        words = ("--cluster", str(CLUSTERS / "kubernetes.yaml"), "--gpus-per-node", "8", *words)
        return yaml.safe_load(preview(capsys, "kubernetes", str(recipe), "run_dir=/runs/one", *words))

    def test_the_ray_job(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        body = self.manifest(capsys, recipe, "--nodes", "3", "--time", "1-02:00:00")
        assert (body["apiVersion"], body["kind"]) == ("ray.io/v1", "RayJob")
        assert body["metadata"] == {"name": "one-coreward", "namespace": "training"}
        assert body["spec"]["activeDeadlineSeconds"] == 26 * 3600
        environment = yaml.safe_load(body["spec"]["runtimeEnvYAML"])["env_vars"]
        config = parse_config(yaml.safe_load(environment["MEGATRON_COREWARD_CONFIG"]))
        assert config.run_dir == Path("/runs/one")

    def test_the_pods(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cluster = self.manifest(capsys, recipe, "--nodes", "3")["spec"]["rayClusterSpec"]
        (group,) = cluster["workerGroupSpecs"]
        assert group["replicas"] == 3
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
        assert {"name": "coreward-runs", "mountPath": "/runs"} in container["volumeMounts"]
        assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
        head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
        assert "nvidia.com/gpu" not in head["resources"]["limits"]
        for env in (container["env"], head["env"]):
            secret = {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api-key"}}}
            assert secret in env

    def test_a_run_that_would_be_lost_with_its_pod(self, recipe: Path) -> None:
        with pytest.raises(InputError, match="run_dir: .* is in no volume of `claims`, .* under /runs, /models"):
            launch_command("kubernetes", str(recipe), "--cluster", str(CLUSTERS / "kubernetes.yaml"), "--dry-run")

    def test_a_claim_with_dots_and_a_python_with_spaces(
        self, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cluster = tmp_path / "k8s.yaml"
        cluster.write_text("kind: kubernetes\nimage: x\nclaims: {runs.v1: /runs}\npython: /opt/my env/python\n")
        words = ("kubernetes", str(recipe), "run_dir=/runs/one", "--cluster", str(cluster))
        body = yaml.safe_load(preview(capsys, *words))
        pod = body["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        claim = {"name": "claim-0", "persistentVolumeClaim": {"claimName": "runs.v1"}}
        assert claim in pod["volumes"]
        assert {"name": "claim-0", "mountPath": "/runs"} in pod["containers"][0]["volumeMounts"]
        assert body["spec"]["entrypoint"].startswith("'/opt/my env/python' -m ")

    @pytest.mark.parametrize("run_dir", ["/runs/../tmp/one", "../etc/one", "/runs2/one"])
    def test_a_run_directory_that_leaves_its_claim_by_dots(self, recipe: Path, run_dir: str) -> None:
        cluster = str(CLUSTERS / "kubernetes.yaml")
        with pytest.raises(InputError, match="run_dir: .* is in no volume of `claims`"):
            launch_command("kubernetes", str(recipe), f"run_dir={run_dir}", "--cluster", cluster, "--dry-run")

    def test_two_claims_in_one_place(self, tmp_path: Path, recipe: Path) -> None:
        cluster = tmp_path / "k8s.yaml"
        cluster.write_text("kind: kubernetes\nimage: x\nclaims: {a: /runs, b: /runs}\n")
        with pytest.raises(InputError, match="claims: two volumes are mounted at one path"):
            launch_command("kubernetes", str(recipe), "run_dir=/runs/1", "--cluster", str(cluster), "--dry-run")


@needs_skypilot
def test_skypilot(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--cluster", str(CLUSTERS / "skypilot.yaml"), "--nodes", "2", "--gpus-per-node", "8")
    files = files_of(preview(capsys, "skypilot", str(recipe), "run_dir=/runs/one", *words))
    task = yaml.safe_load(files["sky jobs launch"])
    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == {"H100": 8}
    assert task["resources"]["use_spot"] is True
    assert "bash /nemo_run/node.sh" in task["run"]
    assert "--secret WANDB_API_KEY=/run/secrets/wandb" in files["driver.sh"]


@pytest.mark.parametrize("kind", ["local", "slurm", "kubernetes", "skypilot"])
@pytest.mark.parametrize("package", ["nemo_run", "psutil"])
def test_packages_that_are_missing_are_named_with_the_remedy(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    """Before anything is written or asked for, by a dry run too."""
    monkeypatch.setitem(sys.modules, package, None)  # as import finds a package that is not there
    words = (kind, str(recipe), "--cluster", str(CLUSTERS / f"{kind}.yaml"), "--dry-run")
    message = f"launch {kind} needs nemo-run and psutil, .*{package}.*: pip install '.\\[launch\\]'"
    with pytest.raises(InputError, match=message):
        launch_command(*words)


def test_gpus_that_the_recipe_does_not_use_are_warned_of_in_a_line(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch_command("slurm", str(recipe), "--nodes", "2", "--gpus-per-node", "8", "--dry-run")
    said = capsys.readouterr().err
    assert said == "warning: --nodes 2 --gpus-per-node 8: 16 GPUs, of which the recipe's layout uses 2\n"
    for fitting in (["--gpus-per-node", "2"], ["--nodes", "2", "--gpus-per-node", "1"], []):
        launch_command("slurm", str(recipe), *fitting, "--dry-run")
        assert capsys.readouterr().err == ""


@pytest.mark.skipif(importlib.util.find_spec("sky") is not None, reason="SkyPilot is installed")
def test_skypilot_where_it_is_not_installed(recipe: Path) -> None:
    with pytest.raises(InputError, match="not installed: pip install 'nemo-run\\[skypilot\\]'"):
        launch_command("skypilot", str(recipe), "--cluster", str(CLUSTERS / "skypilot.yaml"), "--dry-run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("slurm", "--gpus-per-node", "1"), "1 GPUs, and the run needs 2 .1 actor ranks, 1 for rollout engines"),
        (
            ("slurm", "actor.data_parallel=2", "rollout.placement=colocated", "--gpus-per-node", "1"),
            "1 GPUs, and the run needs 2 .2 actor ranks, 1 for rollout engines, colocated",
        ),
        (("slurm", "checkpoint.resume=never"), "checkpoint.resume is never"),
        (("slurm", "--name", "Not/this"), "--name: 'Not/this'; allowed"),
        (("slurm", "--cluster", "absent.yaml"), "--cluster: absent.yaml does not exist"),
        (("slurm", "--time", "soon"), "--time: 'soon'; expected .days-.hours:minutes:seconds"),
        (("slurm", "--time", "00:00:00"), "--time: '00:00:00'; some schedulers read a limit of 0 as no limit"),
        (
            ("slurm", "--time", "00:05:30"),
            "--time: 00:05:30 is no longer than stop_before_s, 300 s, .* again and again",
        ),
        (("slurm", "--name", "9lives"), "--name: '9lives'; allowed: up to 38 .* the first one a letter"),
        (("slurm", "--name", "a" * 39), "--name: 'a+'; allowed: up to 38 "),
        (("slurm", "--name", ""), "--name: ''; allowed"),
        (
            ("slurm", "rollout.tensor_parallel=8", "--nodes", "4", "--gpus-per-node", "4"),
            "rollout.tensor_parallel: an engine of 8 GPUs, and a node has 4 .--gpus-per-node.; .* one node",
        ),
        (("slurm", "actor.fp8_params=true"), "actor.fp8_params: true needs actor.fp8, found null"),
        (("slurm", 'run_dir="runs/a\\nb"'), "run_dir: 'runs/a.*b' has control characters"),
        (("slurm", "stepz=1"), "unknown key 'stepz'; did you mean 'steps'"),
        (("local", "--nodes", "2"), "launch local runs on 1 node"),
        (("local", "--time", "01:00:00"), "launch local has no time limit"),
        (("local", "--detach"), "--detach: a local run ends with its launcher"),
    ],
)
def test_bad_input_is_one_message(recipe: Path, words: tuple[str, ...], message: str) -> None:
    kind, *rest = words
    with pytest.raises(InputError, match=message):
        launch_command(kind, str(recipe), *rest, "--dry-run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("job_dir: launch\n", "job_dir: launch.*; allowed: an absolute path"),
        ("ssh: {host: login, user: me}\n", "ssh: set job_dir and workdir too"),
        ("mounts: [/a:/b]\n", "mounts: there is no image"),
        ("image: x.sqsh\nmounts: [/a:/b:ro]\n", "run_dir: .*/Run_1 is in no mount, .* under /b"),
        ("image: x.sqsh\n", "run_dir: .*/Run_1 is in no mount, .* of which there is none"),
        ("image: x.sqsh\nmounts: [/a:/b]\nworkdir: /b/../c\n", "run_dir: .* is in no mount"),
        ("image: my image.sqsh\nmounts: [/tmp:/tmp]\n", "image: 'my image.sqsh' has ' ', .* quotes no path"),
        ("image: x.sqsh\nmounts: ['/my tmp:/tmp']\n", "mounts: '/my tmp:/tmp' has ' '"),
        ('image: x.sqsh\nmounts: [/tmp:/tmp]\njob_dir: "/tmp/a\'b"\n', 'job_dir: "/tmp/a\'b/run-1" has "\'"'),
        ("time: '00:05:00'\n", "time: 00:05:00 is no longer than stop_before_s, 300 s"),
        ("stop_before_s: 14400\n", "time: 04:00:00 is no longer than stop_before_s, 14400 s"),
        ("sbatch: {array: 0-3}\n", "sbatch.array: not to be set: each of its jobs would train in the same run dir"),
        ("sbatch: {nodes: '2'}\n", "sbatch.nodes: the launch command has an option for it: --nodes"),
        ("sbatch: {signal: USR1@60}\n", "sbatch.signal: not to be set: training would not be asked to save"),
        ("sbatch: {output: x.log}\n", "sbatch.output: not to be set: the job's output is read"),
        ("sbatch: {ntasks_per_node: '8'}\n", "sbatch.ntasks_per_node: not to be set: a node runs one task"),
        ("sbatch: {no-requeue: ''}\n", "sbatch.no-requeue: not to be set: a preempted job could not go on"),
        ("sbatch: {account: a}\n", "sbatch.account: the file has a key of its own for it: account"),
        ("sbatch: {cpus_per_task: '4'}\n", "sbatch.cpus_per_task: .*: cpus_per_task"),
        ("sbatch: {arr: 0-3}\n", "sbatch.arr: short for array; not to be set"),
        ("sbatch: {N: '2'}\n", "sbatch.N: expected the long name of an option"),
        ("sbatch: {--nodes: '2'}\n", "sbatch.--nodes: expected the long name of an option"),
        ('sbatch: {comment: "a\\n#SBATCH --array=0-3"}\n', "sbatch.comment: found .* no control characters"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, text: str, message: str) -> None:
    cluster = slurm_file(tmp_path, text)
    with pytest.raises(InputError, match=message):
        launch_command("slurm", str(write_recipe(tmp_path)), "--cluster", cluster, "--dry-run")
