//! The serial console of a VM: an HTTP/1.1 connection that becomes a plain
//! stream of bytes in both directions.

use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, Version, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;

use super::{state, vm};
use crate::agent::CONSOLE_PROTOCOL;
use crate::http::Served;
use crate::http::error::ApiError;

/// The serial console of a VM, wherever it runs. Send `Connection: upgrade` and
/// `Upgrade: holdfast-console` over HTTP/1.1: after the answer 101 the
/// connection carries the console's bytes both ways.
#[utoipa::path(get, path = "/api/v1/vms/{name}/console", operation_id = "openConsole", tag = "vms", params(("name" = String, Path)), responses(
    (status = 101, description = "the connection is the console now"),
    (status = "default", body = holdfast_api::ErrorBody, description = "an error"),
))]
pub async fn open(
    State(served): State<Served>,
    Path(name): Path<String>,
    mut request: Request,
) -> Result<Response, ApiError> {
    let wanted = request
        .headers()
        .get(header::UPGRADE)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(CONSOLE_PROTOCOL.as_bytes()));
    if request.version() != Version::HTTP_11 || !wanted {
        return Err(ApiError::new(
            "bad_request",
            format!("a console is opened over HTTP/1.1 with `Upgrade: {CONSOLE_PROTOCOL}`"),
        ));
    }
    let id = vm(&*state(&served.agent)?, &name)?.id;
    let mut console = served.agent.console(id).await?;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let copy = async {
            let mut client = TokioIo::new(upgrade.await.map_err(std::io::Error::other)?);
            tokio::io::copy_bidirectional(&mut client, &mut console).await
        };
        tokio::select! {
            () = served.stop.cancelled() => {}
            ended = copy => if let Err(error) = ended {
                tracing::debug!("the console of VM {id} ended: {error}");
            },
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, CONSOLE_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}
