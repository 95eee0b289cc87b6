"""Run a task and check that it reports its progress."""


def run(task, lm):
    counted = []
    results = task.run(lm, counted.append)
    assert sum(counted) == len(task) == len(results)
    return results
