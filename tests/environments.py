"""What launchers put into the environment of a process, and what it is to do then."""

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
JOBSET = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "3",
    "JAX_COORDINATOR_ADDRESS": "run-pod-0-0.run:1234",
    "JAX_NUM_PROCESSES": "4",
}
DETECT = dict.fromkeys(
    ("coordinator_address", "num_processes", "process_id", "cluster_detection_method")
)


def known(coordinator, processes, number):
    return {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


BATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
ALONE = None
LAUNCHERS = {
    "a shell": ({}, ALONE),
    "srun, four tasks": (SLURM, DETECT),
    "srun, one task": (SLURM | {"SLURM_NTASKS": "1"}, ALONE),
    "SLURM_NTASKS empty": (SLURM | {"SLURM_NTASKS": ""}, ALONE),
    "SLURM_NTASKS no number": (
        SLURM | {"SLURM_NTASKS": "4(x2)"},
        "SLURM_NTASKS=4(x2) must be a whole number",
    ),
    "sbatch without srun": (BATCH, ALONE),
    "a shell of srun --pty": (SLURM | {"SLURM_PTY_PORT": "4711"}, DETECT),
    "srun, told the coordinator": (
        SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"},
        DETECT | {"coordinator_address": "a:1"},
    ),
    "mpirun, two processes": (MPI, DETECT),
    "mpirun, one process": ({"OMPI_COMM_WORLD_SIZE": "1"}, ALONE),
    "mpirun in sbatch": (BATCH | MPI, DETECT),
    "OMPI_COMM_WORLD_SIZE empty": ({"OMPI_COMM_WORLD_SIZE": ""}, ALONE),
    "JAX's variables": (JOBSET, known("run-pod-0-0.run:1234", 4, 3)),
    "JAX's variables, one process": (
        JOBSET | {"JAX_NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0"},
        ALONE,
    ),
    "JAX's variables, no address": ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, DETECT),
    "JAX's variables, no number": (
        JOBSET | {"JAX_NUM_PROCESSES": "all"},
        "JAX_NUM_PROCESSES=all must be a whole number",
    ),
    "JAX's variables, nobody": (
        JOBSET | {"JAX_NUM_PROCESSES": "0"},
        "num_processes = 0 must be at least 1",
    ),
    "JAX's variables, empty": (dict.fromkeys(["JAX_COORDINATOR_ADDRESS", *SLURM], ""), ALONE),
    "a pod": (POD, ALONE),
    "a Kubernetes job of one pod": (POD | {"JOB_COMPLETION_INDEX": "0"}, ALONE),
    "a Kubernetes job's third pod": (
        POD | {"JOB_COMPLETION_INDEX": "2"},
        "JOB_COMPLETION_INDEX=2: this is one of several pods of a Kubernetes job, and nothing says "
        "where the others are: set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES",
    ),
    "a TPU VM, which may be one of several": ({"TPU_ML_PLATFORM": "JAX"}, DETECT),
    "a TPU VM of one": ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ML_PLATFORM": "JAX"}, ALONE),
    "two TPU VMs": ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "0"}, DETECT),
    "two slices": ({"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"}, DETECT),
    "two TPU processes": (
        {"TPU_PROCESS_ADDRESSES": "t-0:1,t-1:1", "TPU_WORKER_HOSTNAMES": "t-0"},
        DETECT,
    ),
}
