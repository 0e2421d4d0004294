from dataclasses import dataclass
@dataclass(frozen=True)
class Code:
    name: str = "code"
    runs_code: bool = True
    def grade(self, pairs): raise NotImplementedError
    def votes(self, problems): raise NotImplementedError
    def readable(self, golds): raise NotImplementedError
code = Code()
def problems(name, data): raise NotImplementedError
