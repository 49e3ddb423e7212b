"""The two halves of a device's life, for who schedules many devices: asking for work, and doing it. No waiting."""

from __future__ import annotations

from client_sdk.errors import IllegalTransition
from client_sdk.executor import ActionExecutor
from client_sdk.protocol.errors import PocketfedError, StaleReport
from client_sdk.protocol.messages import Assigned, Assignment, Finished, ReportReply, VirtualTiming, Wait
from client_sdk.session_state import WITH_ASSIGNMENT, Action, CheckIn, Discard, Phase, Sleep, Stop
from client_sdk.stopping import Stopper


def asked(executor: ActionExecutor, virtual: VirtualTiming | None) -> Assigned | Wait | Finished:
    """Drive a session to the server's answer; see ``MobileClient.check_in``."""
    never = Stopper()
    state = executor.session.state
    if state.assignment is not None and (state.phase in {Phase.SEALED, Phase.UPLOADING} or executor.recover_sealed()):
        return Assigned(assignment=state.assignment)
    if state.phase in WITH_ASSIGNMENT and state.phase is not Phase.DONE:
        executor.session.on_assignment_over("the device checks in again")
    action = executor.session.next_action()
    if isinstance(action, Discard):
        executor.execute(action, never)
    if isinstance(executor.session.next_action(), Sleep):
        executor.session.on_slept()
    while True:
        reply = executor.execute(_next(executor), never, virtual)
        if reply is not None:
            return reply
        if executor.held_back is not None:
            raise executor.held_back


def performed(executor: ActionExecutor, assignment: Assignment, stop: Stopper) -> ReportReply:
    """Drive a session until the server holds the report; see ``MobileClient.perform``."""
    _take_over(executor, assignment)
    executor.cause = None
    if isinstance(executor.session.next_action(), Sleep):
        executor.session.on_slept()  # the caller decides when to come
    while True:
        action = _next(executor)
        executor.execute(action, stop)
        if executor.held_back is not None:
            raise executor.held_back
        if isinstance(action, Discard):
            if action.accepted:
                return ReportReply(report_id=action.report_id, assignment_id=assignment.assignment_id)
            raise executor.cause or StaleReport(action.detail)


def _next(executor: ActionExecutor) -> Action:
    action = executor.session.next_action()
    if isinstance(action, Stop):
        raise action.error or executor.cause or PocketfedError(action.detail)
    return action


def _take_over(executor: ActionExecutor, assignment: Assignment) -> None:
    held = executor.session.state.assignment
    if held is not None and held.assignment_id != assignment.assignment_id:
        raise IllegalTransition(
            f"the device holds assignment {held.assignment_id}; check in before performing {assignment.assignment_id}"
        )
    while executor.session.state.phase not in WITH_ASSIGNMENT:
        action = _next(executor)
        if isinstance(action, CheckIn):
            executor.session.on_check_in(Assigned(assignment=assignment))
        elif isinstance(action, Sleep):
            executor.session.on_slept()
        else:
            executor.execute(action, Stopper())
