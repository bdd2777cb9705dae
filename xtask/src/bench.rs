//! `./dev bench`
use crate::error::TaskError;
/// x
/// # Errors
pub fn main(_args: &[String]) -> Result<(), TaskError> {
    Err(TaskError::Failed("wip".into()))
}
