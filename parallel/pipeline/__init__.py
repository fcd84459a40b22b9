"""Pipeline parallelism: schedules as data (`plan`), their execution (`run`) and their pictures (`show`)."""
