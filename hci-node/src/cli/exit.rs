//! How a command ends: one exit code for each kind of outcome, so that scripts can act on it, and one form for errors.
//!
//! An error says what failed, why, the evidence (a task or event id) and the next command to type.

use std::fmt;
use std::process::ExitCode;

use serde::Deserialize;

/// The exit codes of `hci`; the numbers are an interface and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It did what was asked.
    Ok = 0,
    /// It failed for a reason without a code of its own.
    Failed = 1,
    /// The command line or a value in it is wrong.
    Usage = 2,
    /// The named object does not exist.
    NotFound = 3,
    /// The object is in a state, or in use, that does not allow this.
    Conflict = 4,
    /// The caller may not do this.
    NotAllowed = 5,
    /// No node answered, or the cluster has no quorum.
    Unreachable = 6,
    /// The wait ended before the task did; the task goes on.
    TimedOut = 7,
    /// A safety check refused it.
    Refused = 8,
    /// Health: something is degraded.
    Degraded = 10,
    /// Health: something is not available.
    Critical = 11,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A command's failure, in the four parts that a user needs.
#[derive(Debug)]
pub struct CliError {
    /// The code that the process ends with.
    pub exit: Exit,
    /// What failed.
    pub what: String,
    /// Why, when it is known.
    pub why: Option<String>,
    /// A task or event to look at.
    pub evidence: Option<String>,
    /// The next command to type.
    pub next: Option<String>,
}

impl CliError {
    /// A failure with nothing but its description.
    pub fn new(exit: Exit, what: impl Into<String>) -> Self {
        Self { exit, what: what.into(), why: None, evidence: None, next: None }
    }

    /// Adds the reason.
    #[must_use]
    pub fn why(mut self, why: impl fmt::Display) -> Self {
        self.why = Some(why.to_string());
        self
    }

    /// Adds the command that helps.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// The failure that the API reported, by its status and its problem document.
    pub fn from_problem(status: u16, body: &[u8]) -> Self {
        let problem: Problem = serde_json::from_slice(body).unwrap_or_default();
        let exit = match status {
            400 => Exit::Usage,
            401 | 403 => Exit::NotAllowed,
            404 => Exit::NotFound,
            409 => Exit::Conflict,
            412 | 428 => Exit::Refused,
            502 | 503 => Exit::Unreachable,
            504 => Exit::TimedOut,
            _ => Exit::Failed,
        };
        Self {
            exit,
            what: problem.title.unwrap_or_else(|| format!("the node answered with HTTP status {status}")),
            why: problem.detail,
            evidence: problem.evidence,
            next: problem.next,
        }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "error: {}", self.what)?;
        if let Some(why) = &self.why {
            write!(out, "\n  why:      {why}")?;
        }
        if let Some(evidence) = &self.evidence {
            write!(out, "\n  evidence: {evidence}")?;
        }
        if let Some(next) = &self.next {
            write!(out, "\n  next:     {next}")?;
        }
        Ok(())
    }
}

impl std::error::Error for CliError {}

/// The part of an RFC 9457 problem document that the command line shows.
#[derive(Debug, Default, Deserialize)]
struct Problem {
    title: Option<String>,
    detail: Option<String>,
    evidence: Option<String>,
    next: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_document_becomes_the_four_parts() {
        let body = br#"{"title":"volume data1 is in use","detail":"VM web1 has it attached","next":"hci vm delete web1"}"#;
        let error = CliError::from_problem(409, body);
        assert_eq!(error.exit, Exit::Conflict);
        assert_eq!(
            error.to_string(),
            "error: volume data1 is in use\n  why:      VM web1 has it attached\n  next:     hci vm delete web1"
        );
    }

    #[test]
    fn an_answer_that_is_no_problem_document_still_names_the_status() {
        let error = CliError::from_problem(502, b"<html>");
        assert_eq!(error.exit, Exit::Unreachable);
        assert!(error.to_string().contains("502"));
    }
}
