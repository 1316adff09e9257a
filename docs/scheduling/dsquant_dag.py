"""Airflow: `dsquant run` every night; tried again where it stopped resumably (exit code 75), else failed at once."""

import subprocess
from datetime import datetime, timedelta

from airflow import DAG
from airflow.exceptions import AirflowException, AirflowFailException
from airflow.operators.python import PythonOperator

RECIPE = "/srv/dsquant/recipes/r1-awq-4bit.yaml"
RESUMABLE = 75


def run_recipe() -> None:
    """Runs the recipe; raises what makes Airflow try again, or give up."""
    code = subprocess.run(["dsquant", "run", RECIPE, "--json"], cwd="/srv/dsquant", check=False).returncode
    if code == RESUMABLE:
        raise AirflowException("stopped, and can be gone on with")
    if code != 0:
        raise AirflowFailException(f"dsquant run ended with {code}: see docs/scheduling/README.md")


with DAG(
    dag_id="dsquant_r1_awq_4bit",
    schedule="30 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 5, "retry_delay": timedelta(minutes=10)},
):
    PythonOperator(task_id="run", python_callable=run_recipe)
