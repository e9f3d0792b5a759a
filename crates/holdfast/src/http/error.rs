//! How anything that goes wrong is answered: a status, a word for programs and
//! a sentence for people.

use axum::Json;
use axum::extract::FromRequest;
use axum::extract::rejection::BytesRejection;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use holdfast_api::{ErrorBody, ErrorDetail};
use holdfast_core::Refusal;
use serde::de::DeserializeOwned;

use crate::agent::Failure;

/// An answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// For programs.
    pub code: String,
    /// For people: what happened, to what, what to do.
    pub message: String,
}

impl ApiError {
    /// An error with the status that belongs to its code.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        ApiError { status: status_of(code), code: code.into(), message: message.into() }
    }

    /// A request that can never succeed as it is.
    pub fn invalid(message: impl Into<String>) -> Self {
        ApiError::new("invalid", message)
    }

    /// There is no such thing.
    pub fn not_found(what: &str, name: &str) -> Self {
        Refusal::Unknown { what: what.into(), name: name.into() }.into()
    }
}

/// The status for a code; a code that only one place knows says that the
/// request was understood and cannot be done.
fn status_of(code: &str) -> StatusCode {
    match code {
        "bad_request" => StatusCode::BAD_REQUEST,
        "no_token" => StatusCode::UNAUTHORIZED,
        "bad_token" | "forbidden" | super::gate::REMOVED => StatusCode::FORBIDDEN,
        "not_found" => StatusCode::NOT_FOUND,
        "method_not_allowed" => StatusCode::METHOD_NOT_ALLOWED,
        "already_in_cluster" | "already_exists" | "conflict" | "stale" | "not_in_cluster" => StatusCode::CONFLICT,
        "too_large" => StatusCode::PAYLOAD_TOO_LARGE,
        "internal" => StatusCode::INTERNAL_SERVER_ERROR,
        "no_coordinator" => StatusCode::SERVICE_UNAVAILABLE,
        "unknown" => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::UNPROCESSABLE_ENTITY,
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        ApiError::new(refusal.code(), refusal.to_string())
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        match failure {
            Failure::Refused(refusal) => refusal.into(),
            Failure::NotInCluster | Failure::Removed { .. } => ApiError::new("not_in_cluster", message),
            Failure::NoCoordinator { .. } => ApiError::new("no_coordinator", message),
            Failure::Unknown => ApiError::new("unknown", message),
            Failure::Other { code, text } => ApiError::new(code, text),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let challenge = (self.status == StatusCode::UNAUTHORIZED).then_some([(header::WWW_AUTHENTICATE, "Bearer")]);
        let body = ErrorBody { error: ErrorDetail { code: self.code, message: self.message } };
        (self.status, challenge, Json(body)).into_response()
    }
}

/// A JSON body. An absent one counts as `{}`, so that actions whose settings
/// are all optional need none.
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: axum::extract::Request, state: &S) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, state).await.map_err(|refused| match refused {
            BytesRejection::FailedToBufferBody(inner) if inner.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                ApiError::new("too_large", "the request's body is larger than 1 MiB")
            }
            other => ApiError::new("bad_request", format!("the request's body did not arrive: {other}")),
        })?;
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        serde_json::from_slice(text)
            .map(Body)
            .map_err(|error| ApiError::invalid(format!("the request's body: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_its_status() {
        let unknown = Refusal::Unknown { what: "VM".into(), name: "web".into() };
        let room = Refusal::NoRoom { vm: "web".into(), why: "n1 is not up".into() };
        let other = Failure::Other { code: "volume_differs", text: "n2 sees another directory".into() };
        let cases: [(Failure, u16, &str); 11] = [
            (unknown.into(), 404, "not_found"),
            (Refusal::Duplicate { what: "VM".into(), name: "web".into() }.into(), 409, "already_exists"),
            (Refusal::Conflict("it runs".into()).into(), 409, "conflict"),
            (Refusal::Invalid("no".into()).into(), 422, "invalid"),
            (room.into(), 422, "no_room"),
            (Refusal::Token("expired".into()).into(), 403, "bad_token"),
            (Failure::NoCoordinator { seconds: 5 }, 503, "no_coordinator"),
            (Failure::Unknown, 504, "unknown"),
            (Failure::NotInCluster, 409, "not_in_cluster"),
            (Failure::Removed { kept: "/var/lib/holdfast/removed-7".into() }, 409, "not_in_cluster"),
            (other, 422, "volume_differs"),
        ];
        for (failure, status, code) in cases {
            let text = failure.to_string();
            let answer = ApiError::from(failure);
            assert_eq!((answer.status.as_u16(), answer.code.as_str()), (status, code));
            assert_eq!(answer.message, text);
        }
    }
}
