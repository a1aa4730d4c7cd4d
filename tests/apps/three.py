"""Operations of three tasks, some of which fail at the second."""

from kser import Operation, OperationRegistry, Result, Task

registry = OperationRegistry()


@registry.subscribe
class Step(Task):
    def run(self):
        if self.params.get("fails"):
            raise ValueError(f"{self.uuid} was to fail")
        return Result(stdout=f"step {self.params['step']}", retval={self.params["step"]: self.uuid})


@registry.subscribe
class Three(Operation):
    def build_tasks(self, fails=False, **params):
        return [Step(params={"step": str(number), "fails": fails and number == 1}) for number in range(3)]
