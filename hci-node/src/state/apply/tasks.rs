//! Tasks: progress and end.

use super::{Applied, not_found};
use crate::state::{ClusterState, Goal, Refusal, Subject, TaskError, TaskId, TaskState, Timestamp};

pub(super) fn update(
    state: &mut ClusterState,
    id: TaskId,
    permille: u16,
    message: &str,
) -> Result<Applied, Refusal> {
    let task = state.tasks.get_mut(&id).ok_or_else(|| not_found("task", id))?;
    if task.state == TaskState::Running {
        // Steps may be repeated after a restart; progress that people see does not go back.
        task.permille = task.permille.max(permille.min(999));
        task.message = message.to_owned();
    }
    Ok(Applied::now("task update", Subject::Cluster, ""))
}

pub(super) fn finish(
    state: &mut ClusterState,
    id: TaskId,
    error: Option<&TaskError>,
    at: Timestamp,
) -> Result<Applied, Refusal> {
    let task = state.tasks.get_mut(&id).ok_or_else(|| not_found("task", id))?;
    if task.state == TaskState::Running {
        task.finished = Some(at);
        match error {
            None => {
                task.state = TaskState::Done;
                task.permille = 1000;
                task.message = String::new();
            }
            Some(error) => task.state = TaskState::Failed(error.clone()),
        }
        state.forget_old_tasks();
    }
    Ok(Applied::now("task finish", Subject::Cluster, ""))
}

/// Ends all running tasks with a goal.
pub(super) fn settle(state: &mut ClusterState, goal: &Goal, error: Option<&TaskError>, at: Timestamp) {
    settle_where(state, |other| other == goal, error, at);
}

/// Ends all running tasks whose goal is meant.
pub(super) fn settle_where(
    state: &mut ClusterState,
    is_meant: impl Fn(&Goal) -> bool,
    error: Option<&TaskError>,
    at: Timestamp,
) {
    let ids: Vec<_> = state
        .tasks
        .values()
        .filter(|task| task.state == TaskState::Running && is_meant(&task.goal))
        .map(|task| task.id)
        .collect();
    for id in ids {
        // Present by construction; finishing a running task is never refused.
        let _ = finish(state, id, error, at);
    }
}
